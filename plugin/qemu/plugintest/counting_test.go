// SPDX-License-Identifier: Apache-2.0

package plugintest

import (
	"bufio"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/plugin/lab/guest"
)

//go:embed work.sh
var work []byte

// countings are what BenchmarkCounting compares, the first with each other: QEMU
// without and with counted instructions, that with the CPU that Transform gives
// to a domain that names none, and with other lengths of an instruction.
var countings = []struct {
	name string
	args []string
}{
	{"plain", []string{"-accel", "tcg,thread=single", "-cpu", "qemu64"}},
	{"counted", []string{"-icount", "shift=2,sleep=on", "-cpu", "qemu64"}},
	{"counted, model 4", []string{"-icount", "shift=2,sleep=on", "-cpu", "qemu64,model=4"}},
	{"model 4, shift 1", []string{"-icount", "shift=1,sleep=on", "-cpu", "qemu64,model=4"}},
	{"model 4, shift 3", []string{"-icount", "shift=3,sleep=on", "-cpu", "qemu64,model=4"}},
	{"counted, kvm64", []string{"-icount", "shift=2,sleep=on", "-cpu", "kvm64"}},
	{"counted, max", []string{"-icount", "shift=2,sleep=on", "-cpu", "max"}},
}

// BenchmarkCounting tells what counting instructions costs, in CPU time of QEMU,
// and how fast the guest's clock runs beside that.
func BenchmarkCounting(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	art, err := guest.Build(ctx, "../../../build/guest")
	if err != nil {
		b.Fatal(err)
	}
	plain, err := os.ReadFile(art.Initrd)
	if err != nil {
		b.Fatal(err)
	}
	text, err := guest.WithScript(plain, "work", work)
	if err != nil {
		b.Fatal(err)
	}
	initrd := filepath.Join(b.TempDir(), "initrd")
	if err := os.WriteFile(initrd, text, 0o600); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		base := map[string]time.Duration{}
		for _, c := range countings {
			line := fmt.Sprintf("%-17s", c.name)
			for _, s := range doWork(ctx, b, art.Kernel, initrd, c.args) {
				if base[s.name] == 0 {
					base[s.name] = s.cpu
				}
				line += fmt.Sprintf("  %s %.2f s (x%.2f, clock x%.1f)", s.name, s.cpu.Seconds(),
					s.cpu.Seconds()/base[s.name].Seconds(), s.guest.Seconds()/s.cpu.Seconds())
			}
			b.Log(line)
		}
	}
}

type stretch struct {
	name       string
	cpu, guest time.Duration
}

func doWork(ctx context.Context, b *testing.B, kernel, initrd string, args []string) []stretch {
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append([]string{
		"-nodefaults", "-display", "none", "-machine", "pc-q35-10.0,hpet=off", "-m", "256", "-no-reboot", "-serial", "stdio",
		"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1 rdinit=/work",
	}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	var all []stretch
	var lastCPU, lastGuest time.Duration
	for s := bufio.NewScanner(out); s.Scan(); {
		_, mark, ok := strings.Cut(s.Text(), "MARK ")
		var name string
		var uptime float64
		if n, _ := fmt.Sscan(mark, &name, &uptime); !ok || n != 2 {
			continue
		}
		cpu, now := cpuTime(b, cmd.Process.Pid), time.Duration(uptime*float64(time.Second))
		all = append(all, stretch{name, max(cpu-lastCPU, 10*time.Millisecond), now - lastGuest})
		lastCPU, lastGuest = cpu, now
	}
	if err := cmd.Wait(); err != nil {
		b.Fatal(err)
	}
	if len(all) != strings.Count(string(work), "\nmark ") {
		b.Fatalf("the guest did %d stretches of its work", len(all))
	}
	return all
}

// cpuTime is that of a process so far, of which the kernel tells 10 ms.
func cpuTime(b *testing.B, pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	var user, system int64
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		b.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}
