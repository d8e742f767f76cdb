// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"testing"

	"ftvirt.org/ftvirt/plugin/doctor"
	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/scenario"
)

// observed holds what the hosts of a protected pair show to people and programs
// against what is known of it.
func observed(t *testing.T, b *scenario.Bed, vm *scenario.VM, primary, backup *lab.Host) {
	t.Helper()
	findings, err := b.Agent(primary).Doctor(t.Context(), backup.Name)
	must(t, err)
	for _, f := range findings {
		if f.Level == doctor.Problem {
			t.Errorf("the doctor finds %+v on hosts that have a pair", f)
		}
	}
	metric := func(h *lab.Host, name, labels string) float64 {
		t.Helper()
		var text bytes.Buffer
		must(t, b.Agent(h).Metrics(t.Context(), &text))
		line := regexp.MustCompile(fmt.Sprintf(`(?m)^%s\{domain="%s"%s\} (\S+)$`, name, regexp.QuoteMeta(vm.Name), labels))
		m := line.FindSubmatch(text.Bytes())
		if m == nil {
			t.Errorf("%s shows no %s of %s", h.Name, name, vm.Name)
			return 0
		}
		v, err := strconv.ParseFloat(string(m[1]), 64)
		must(t, err)
		return v
	}
	for _, h := range []*lab.Host{primary, backup} {
		if metric(h, "ftvirt_domain_state", `,state="protected"`) != 1 {
			t.Errorf("the metrics of %s do not show that the domain is protected", h.Name)
		}
	}
	released := metric(primary, "ftvirt_domain_output_released_packets_total", "")
	if delays := metric(primary, "ftvirt_domain_output_delay_seconds_count", ""); released == 0 || delays < released {
		t.Errorf("%g packets left, and the delays of %g are counted", released, delays)
	}
	if n := metric(primary, "ftvirt_domain_ack_latency_seconds_count", ""); n == 0 {
		t.Error("no ack was timed")
	}
	if p, r := metric(primary, "ftvirt_domain_log_bytes_total", ""), metric(backup, "ftvirt_domain_log_bytes_total", ""); p == 0 || r == 0 {
		t.Errorf("logged %g bytes, replayed %g", p, r)
	}
}
