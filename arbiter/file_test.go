// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"errors"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin"
)

func TestFileNames(t *testing.T) {
	for _, epoch := range []plugin.Epoch{1, 7, 99999999, 100000000, 1<<64 - 1} {
		name := fileName(epoch, kindOwner)
		if got, k, ok := parseName(name); !ok || got != epoch || k != kindOwner {
			t.Errorf("parseName(%q) gives %d, %q, %v", name, got, k, ok)
		}
	}
	for _, name := range []string{
		"", "epoch-", "epoch-.owner", "epoch-00000000.owner", "epoch-7.owner", "epoch-000000007.owner",
		"00000007.owner", "epoch-00000007.owner~", "epoch-00000007.marker", "epoch-00000007", ".tmp-x",
		"epoch--0000007.owner", "epoch-+0000007.owner", "epoch-18446744073709551616.owner",
	} {
		if epoch, k, ok := parseName(name); ok {
			t.Errorf("parseName(%q) gives %d, %q", name, epoch, k)
		}
	}
}

func FuzzDecode(f *testing.F) {
	domain := plugin.UUID{0xf7}.String()
	good, err := contents{
		Kind: kindOwner, Domain: domain, Epoch: 7, Host: "a", Time: time.Unix(1, 2), Token: "t",
	}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-9])
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"kind":"owner","time":"x"}`))
	f.Add([]byte("null"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := decode(text, "p", kindOwner, domain, 7)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error %v is not ErrCorrupt", err)
			}
			return
		}
		// Nothing but a file that a host wrote for this epoch is accepted.
		if c.Host == "" || c.Epoch != 7 || c.Domain != domain || c.Kind != kindOwner {
			t.Fatalf("accepted %q", text)
		}
	})
}
