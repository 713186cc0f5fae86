package rpc

import (
	v1 "github.com/keycustody/custodian/api/custodian/v1"
	"github.com/keycustody/custodian/custodian"
)

// sealed puts the sealed key in the place of the one in clear. A nil one leaves
// the key as it is.
func (p *keyParts) sealed(c *call, to *custodian.SealedTo) {
	if to == nil {
		return
	}
	p.key.KeyMaterial = &v1.ContentKey_SealedKey{SealedKey: &v1.SealedKey{RecipientKeyId: to.KeyID, Caller: c.caller.ID, Sealed: to.Bytes}}
}
