// Package custodian is the domain: the vocabulary of key custody and every
// decision about keys. It decides who may have which key (policy.go), whether
// a key may be used now (state.go), which key version wraps (keyring.go), and
// which bytes of a record are authenticated (encoding.go).
//
// It leaves to others how a token works (HSM), how an outer wrap is made
// (Provider), how records rest (Store), how the audit log is kept
// (internal/audit) and how a caller speaks to us (internal/rpc).
package custodian
