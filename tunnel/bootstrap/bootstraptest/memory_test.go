package bootstraptest

import "testing"

func TestMemory(t *testing.T) {
	RunSuite(t, func(*testing.T) Fixture {
		m := new(Memory)
		return Fixture{Keeper: m, Token: m.Token, Revoke: m.Revoke, Take: m.Take}
	})
}
