// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"ftvirt.org/ftvirt/plugin/agent"
	"ftvirt.org/ftvirt/plugin/agent/client"
)

func TestVerify(t *testing.T) {
	t.Parallel()
	plan := client.VerifyPlan{Domain: "web", Peer: "hostb", Memory: 256 << 20, Disks: 70 << 20}
	equal := client.Verification{
		Domain: "web", UUID: webID, Epoch: 3, Primary: "hosta", Backup: "hostb", Position: 4096, Instructions: 123456, Pause: 712.4, Equal: true,
		Parts: []client.VerifyPart{
			{Kind: "registers", Name: "vcpu0", Size: 184, Equal: true},
			{Kind: "memory", Name: "pc.ram", Size: 256 << 20, Equal: true},
			{Kind: "disk", Name: "vda", Size: 64 << 20, Equal: true},
		},
	}
	differs := equal
	differs.Equal, differs.Discarded = false, true
	differs.Parts = []client.VerifyPart{
		{Kind: "registers", Name: "vcpu0", Size: 184, Different: 8, Detail: []string{"RIP is 0x10 here and 0x20 on the backup"}},
		{Kind: "memory", Name: "pc.ram", Size: 256 << 20, Different: 7 << 16, Ranges: []client.VerifyRange{
			{Length: 1 << 16}, {Start: 1 << 20, Length: 2 << 16}, {Start: 2 << 20, Length: 1 << 16}, {Start: 3 << 20, Length: 1 << 16}, {Start: 4 << 20, Length: 2 << 16},
		}},
		{Kind: "disk", Name: "vda", Size: 64 << 20, Equal: true},
	}
	for _, tc := range []struct {
		golden, args string
		found        client.Verification
		code         int
	}{
		{"verify-equal.table", "verify web", equal, exitOK},
		{"verify-differs.table", "verify web", differs, exitDiffers},
		{"verify-differs.json", "verify web -o json --keep --timeout 2s", differs, exitDiffers},
	} {
		f := serve(t, map[string]any{"GET /v1/verify/web": plan, "POST /v1/verify": tc.found})
		r := run(t, "", append(strings.Fields(tc.args), "--socket", f.socket)...)
		if r.code != tc.code {
			t.Errorf("%s: exit %d, want %d: %s", tc.args, r.code, tc.code, r.errors)
		}
		limit := "30s"
		if strings.Contains(tc.args, "2s") {
			limit = "2s"
		}
		want := "domain web stands still while 256 MiB of memory and 70 MiB of disks are read, for about 1.1s and at most " + limit + "\n"
		if r.errors != want {
			t.Errorf("%s says %q, want %q", tc.args, r.errors, want)
		}
		golden(t, tc.golden, r.out)
	}
	f := serve(t, nil)
	if r := run(t, "", "verify", "web", "--timeout", "0", "--socket", f.socket); r.code != exitUsage || f.requests() != nil {
		t.Errorf("no time: %+v", r)
	}
}

// TestVerificationIsTheAgents: what the agent sends is what the client knows.
func TestVerificationIsTheAgents(t *testing.T) {
	sent := agent.Verification{
		Domain: "web", UUID: webID, Epoch: 1, Primary: "a", Backup: "b", Position: 2, Instructions: 3, Pause: 4, Equal: true, Discarded: true,
		Parts: []agent.Part{{Kind: "disk", Name: "vda", Size: 1, Equal: true, Different: 2, Ranges: []agent.Range{{Start: 3, Length: 4}}, Detail: []string{"x"}}},
	}
	text, err := json.Marshal(sent)
	if err != nil {
		t.Fatal(err)
	}
	var got client.Verification
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(got)
	if err != nil || string(again) != string(text) {
		t.Errorf("sent %s, understood %s (%v)", text, again, err)
	}
}
