// SPDX-License-Identifier: Apache-2.0

package storagetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/arbiter/arbitertest"
	"ftvirt.org/ftvirt/arbiter/backend"
	"ftvirt.org/ftvirt/arbiter/scsi"
	"ftvirt.org/ftvirt/plugin/config"
)

// iscsidConf lets commands fail soon when the session is gone, as the storage of
// an arbiter should: a host that waits asks again.
const iscsidConf = `
node.startup = manual
node.session.timeo.replacement_timeout = 2
node.conn[0].timeo.login_timeout = 5
node.conn[0].timeo.noop_out_interval = 1
node.conn[0].timeo.noop_out_timeout = 2
`

const (
	tgtPort = 3260
	// sanPort is where the other target is to be found on the host.
	sanPort = 3261
	lunSize = 1 << 20 // in bytes
	iqn     = "iqn.2026-01.org.ftvirt:"
)

// How the LUNs decide. Each is on a target of its own.
const (
	compare = "compare"
	reserve = "reserve"
)

// lunOf gives the number of a LUN.
var lunOf = map[string]int{compare: 1, reserve: 2}

// crashPoints are the steps, of each LUN, at which processes die.
var crashPoints = map[string][]string{
	compare: {"before 89", "after 89"},
	reserve: {"before 5f", "after 5f", "before 8a", "after 8a"},
}

// tgt is a running tgtd with one target of one LUN.
type tgt struct {
	dir string
	cmd *exec.Cmd
}

func startTGT(t *testing.T) *tgt {
	t.Helper()
	s := &tgt{dir: t.TempDir()}
	makeImage(t, s.image())
	t.Cleanup(func() {
		if text, err := os.ReadFile(filepath.Join(s.dir, "log")); t.Failed() {
			t.Logf("tgtd: %v\n%s", err, text)
		}
	})
	s.restart(t)
	return s
}

func makeImage(t *testing.T, path string) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, lunSize)); err != nil {
		t.Fatal(err)
	}
}

func (s *tgt) image() string { return filepath.Join(s.dir, "lun") }

func (s *tgt) process() *os.Process { return s.cmd.Process }

func (s *tgt) restart(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	s.cmd = exec.Command("tgtd", "-f", "-t", "1", "--iscsi", fmt.Sprintf("portal=127.0.0.1:%d", tgtPort))
	s.cmd.Env = append(os.Environ(), "TGT_IPC_SOCKET="+s.socket())
	s.cmd.Stdout, s.cmd.Stderr = log, log
	start(t, s.cmd)
	waitFor(t, 10*time.Second, "tgtd", func() error { return s.admin("--mode", "system", "--op", "show") })
	for _, args := range [][]string{
		{"--lld", "iscsi", "--mode", "target", "--op", "new", "--tid", "1", "--targetname", iqn + reserve},
		{"--lld", "iscsi", "--mode", "logicalunit", "--op", "new", "--tid", "1", "--lun", fmt.Sprint(lunOf[reserve]), "--backing-store", s.image()},
		{"--lld", "iscsi", "--mode", "target", "--op", "bind", "--tid", "1", "--initiator-address", "ALL"},
	} {
		if err := s.admin(args...); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *tgt) socket() string { return filepath.Join(s.dir, "ipc") }

func (s *tgt) admin(args ...string) error {
	cmd := exec.Command("tgtadm", args...)
	cmd.Env = append(os.Environ(), "TGT_IPC_SOCKET="+s.socket())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("tgtadm %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (s *tgt) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
	_ = os.Remove(s.socket())
}

// sanScript makes a virtual machine a target, with its disk as the LUN.
const sanScript = `set -e
for m in $(cat /modules/order.san); do insmod /modules/$m 2>/dev/null || true; done
mount -t configfs config /sys/kernel/config
cd /sys/kernel/config/target
mkdir -p core/iblock_0/arbiter
echo udev_path=/dev/vda >core/iblock_0/arbiter/control
echo 1 >core/iblock_0/arbiter/enable
mkdir -p iscsi/IQN/tpgt_1/lun/lun_LUN
cd iscsi/IQN/tpgt_1
ln -s /sys/kernel/config/target/core/iblock_0/arbiter lun/lun_LUN/arbiter
echo 0 >attrib/authentication
echo 0 >attrib/demo_mode_write_protect
echo 1 >attrib/generate_node_acls
mkdir np/10.0.2.15:3260
echo 1 >enable`

// san is a virtual machine that is a target.
type san struct {
	*machine
	image string
}

func startSAN(t *testing.T) *san {
	t.Helper()
	s := &san{image: filepath.Join(t.TempDir(), "lun")}
	makeImage(t, s.image)
	s.bootAgain(t)
	return s
}

func (s *san) bootAgain(t testing.TB) {
	t.Helper()
	s.machine = boot(t, "san",
		"-netdev", fmt.Sprintf("user,id=n,hostfwd=tcp:127.0.0.1:%d-:3260", sanPort),
		"-drive", "if=virtio,format=raw,file="+s.image)
}

func (s *san) serve(t testing.TB) {
	t.Helper()
	s.run(t, nil, "/bin/sh", "-c", strings.NewReplacer("IQN", iqn+compare, "LUN", fmt.Sprint(lunOf[compare])).Replace(sanScript))
}

func (s *san) process() *os.Process { return s.cmd.Process }

func (s *san) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func (s *san) restart(t testing.TB) {
	t.Helper()
	s.bootAgain(t)
	s.serve(t)
}

// logIn makes the guest an initiator; the kernel needs a helper that brings
// lost sessions back.
func (m *machine) logIn(t *testing.T) {
	t.Helper()
	script := strings.NewReplacer("NAME", m.name,
		"NODE1", fmt.Sprintf("-T %s -p 10.0.2.2:%d", iqn+compare, sanPort),
		"NODE2", fmt.Sprintf("-T %s -p 10.0.2.2:%d", iqn+reserve, tgtPort)).Replace(`set -e
echo InitiatorName=iqn.2026-01.org.ftvirt:NAME >/etc/iscsi/initiatorname.iscsi
iscsid
iscsiadm -m node NODE1 -o new
iscsiadm -m node NODE2 -o new
iscsiadm -m node NODE1 --login
iscsiadm -m node NODE2 --login
i=0
until ls /sys/class/scsi_disk/*:1 && ls /sys/class/scsi_disk/*:2; do i=$((i+1)); [ $i -lt 100 ]; usleep 100000; done`)
	m.run(t, nil, "/bin/sh", "-c", script)
}

// deviceOf gives the block device of a LUN in the guest, by SCSI address: the
// guest has no udev that would name it by identity.
func deviceOf(mode string) (string, error) {
	names, err := filepath.Glob(fmt.Sprintf("/sys/class/scsi_disk/*:%d/device/block/*", lunOf[mode]))
	if err != nil || len(names) != 1 {
		return "", fmt.Errorf("LUN %d: %q, %w", lunOf[mode], names, err)
	}
	return "/dev/" + filepath.Base(names[0]), nil
}

func lunConfig(mode string) (config.Arbiter, error) {
	path, err := deviceOf(mode)
	return config.Arbiter{Kind: config.ArbiterLUN, Device: path}, err
}

// killer ends the process before or after a command, as in "after 89".
type killer struct {
	*scsi.SG
	point string
}

func (k killer) Do(ctx context.Context, c scsi.Command) (scsi.Result, error) {
	if k.point == fmt.Sprintf("before %02x", c.CDB[0]) {
		return scsi.Result{}, errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), context.Canceled)
	}
	r, err := k.SG.Do(ctx, c)
	if k.point == fmt.Sprintf("after %02x", c.CDB[0]) {
		return scsi.Result{}, errors.Join(syscall.Kill(os.Getpid(), syscall.SIGKILL), context.Canceled)
	}
	return r, err
}

// lun is the backend on a LUN, in a guest. All tests share it: each has a domain
// of its own.
var lun = arbitertest.Backend{
	Name: "lun",
	New: func(t testing.TB) string {
		mode := os.Getenv(envStorage)
		cfg, err := lunConfig(mode)
		if err != nil {
			t.Fatal(err)
		}
		info, err := backend.Init(t.Context(), cfg, false, time.Minute)
		if err != nil || info.LUN.Reservation != (mode == reserve) {
			t.Fatalf("Init: %+v, %v", info.LUN, err)
		}
		return mode
	},
	Connect: func(target string) (arbiter.Arbiter, error) {
		cfg, err := lunConfig(target)
		if err != nil {
			return nil, err
		}
		return backend.New(cfg, time.Minute)
	},
	Break: func(t testing.TB, target string) func() {
		device, err := deviceOf(target)
		if err != nil {
			t.Fatal(err)
		}
		set := func(state string) {
			if err := os.WriteFile("/sys/block/"+filepath.Base(device)+"/device/state", []byte(state+"\n"), 0); err != nil {
				t.Error(err)
			}
		}
		set("offline")
		return func() { set("running") }
	},
	Crashing: func(target, point string) (arbiter.Arbiter, error) {
		cfg, err := lunConfig(target)
		if err != nil {
			return nil, err
		}
		sg, err := scsi.OpenSG(cfg.Device)
		if err != nil {
			return nil, err
		}
		return arbiter.NewLUN(arbiter.LUNConfig{Transport: killer{sg, point}})
	},
	Processes: true,
}
