package custodiantest_test

import (
	"testing"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/custodian/custodiantest"
)

func TestNewStore(t *testing.T) {
	custodiantest.TestStore(t, func(t *testing.T) (custodian.Store, func() custodian.Store) {
		s := custodiantest.NewStore()
		return s, func() custodian.Store { return s }
	})
}
