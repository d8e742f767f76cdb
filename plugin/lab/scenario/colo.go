// SPDX-License-Identifier: Apache-2.0

package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ftvirt.org/ftvirt/plugin/lab"
	"ftvirt.org/ftvirt/plugin/lab/guest"
)

// colo is a pair of QEMU's COLO, made as docs/COLO-FT.txt of QEMU says: the
// guest runs on both sides, their packets are compared, and the secondary gets
// the primary's state when they differ and each 20 s. It is given what ftvirt's
// pairs are: the same guest, hosts, networks and cores. The machine is "pc", as
// there; with "q35" the secondary fails an assertion at its first checkpoint.
type colo struct {
	name               string
	primary, secondary *coloSide
	guest              guest.Client
}

// coloSide is one QEMU of it.
type coloSide struct {
	*monitor
	host   *lab.Host
	cmd    *exec.Cmd
	output bytes.Buffer
	ended  chan struct{}
}

// Ports of the pair on the logging network, as in QEMU's document.
const (
	coloMirror  = 9003
	coloCompare = 9004
	coloMigrate = 9998
	coloDisk    = 9999
)

// coloGuest is the number of COLO's guest among the lab's.
const coloGuest = 9

func (b *benchmark) coloClient() guest.Client {
	return guest.Client{Dial: b.Client.Dial, Address: lab.GuestAddr(coloGuest).Addr()}
}

// startCOLO boots a guest under COLO.
func (b *benchmark) startCOLO(ctx context.Context, name string) (_ *colo, err error) {
	hosta, hostb := b.Pair()
	d, err := hosta.GuestDomain(ctx, coloGuest, name, "qcow2")
	if err != nil {
		return nil, err
	}
	if _, err := hostb.GuestDomain(ctx, coloGuest, name, "qcow2"); err != nil {
		return nil, err
	}
	c := &colo{name: name, guest: b.coloClient()}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w%s", err, c.words(context.WithoutCancel(ctx))), c.end(context.WithoutCancel(ctx)))
		}
	}()
	hardware := []string{
		"-machine", "pc,accel=tcg", "-cpu", "qemu64", "-smp", "1", "-m", strconv.Itoa(benchMemory), "-display", "none", "-nodefaults", "-no-user-config",
		"-kernel", d.Kernel, "-initrd", d.Initrd, "-append", "console=ttyS0 quiet ip=" + d.Address.String() + " " + guest.BenchCmdline,
		"-chardev", "file,id=console,path=" + filepath.Join("/var/log/libvirt", name+".log"), "-serial", "chardev:console",
		"-qmp", "unix:" + coloSocket + ",server=on,wait=off",
		"-netdev", "tap,id=net,ifname=" + coloTap + ",script=no,downscript=no,vhost=off",
		"-device", "virtio-net-pci,netdev=net,romfile=,mac=" + d.MAC,
	}
	const hdr = ",vnet_hdr_support=on"
	disk := "-drive"
	c.primary, err = b.startSide(ctx, hosta, corePrimary, append(hardware,
		"-chardev", fmt.Sprintf("socket,id=mirror,host=%s,port=%d,server=on,wait=off", hosta.LoggingAddr(), coloMirror),
		"-chardev", fmt.Sprintf("socket,id=secondary,host=%s,port=%d,server=on,wait=off", hosta.LoggingAddr(), coloCompare),
		"-chardev", "socket,id=compare,path=/run/colo-compare,server=on,wait=off",
		"-chardev", "socket,id=compare-in,path=/run/colo-compare",
		"-chardev", "socket,id=out,path=/run/colo-out,server=on,wait=off",
		"-chardev", "socket,id=compare-out,path=/run/colo-out",
		"-object", "filter-mirror,id=mirror0,netdev=net,queue=tx,outdev=mirror"+hdr,
		"-object", "filter-redirector,id=redirector0,netdev=net,queue=rx,indev=out"+hdr,
		"-object", "filter-redirector,id=redirector1,netdev=net,queue=rx,outdev=compare"+hdr,
		"-object", "iothread,id=comparer",
		"-object", "colo-compare,id=compare0,primary_in=compare-in,secondary_in=secondary,outdev=compare-out,iothread=comparer"+hdr,
		disk, "if=none,id=disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0.driver=qcow2,children.0.file.filename="+d.Disk,
		"-device", "virtio-blk-pci,drive=disk0", "-S"))
	if err != nil {
		return c, err
	}
	for _, layer := range []string{"active", "hidden"} {
		if _, err := hostb.Exec(ctx, "qemu-img", "create", "-q", "-f", "qcow2", d.Disk+"."+layer, strconv.Itoa(guest.BenchDiskSize)); err != nil {
			return c, err
		}
	}
	c.secondary, err = b.startSide(ctx, hostb, coreBackup, append(hardware,
		"-chardev", fmt.Sprintf("socket,id=mirrored,host=%s,port=%d,reconnect=1", hosta.LoggingAddr(), coloMirror),
		"-chardev", fmt.Sprintf("socket,id=compared,host=%s,port=%d,reconnect=1", hosta.LoggingAddr(), coloCompare),
		"-object", "filter-redirector,id=redirector0,netdev=net,queue=tx,indev=mirrored"+hdr,
		"-object", "filter-redirector,id=redirector1,netdev=net,queue=rx,outdev=compared"+hdr,
		"-object", "filter-rewriter,id=rewriter0,netdev=net,queue=all"+hdr,
		disk, "if=none,id=parent0,driver=qcow2,file.filename="+d.Disk,
		disk, "if=none,id=child0,driver=replication,mode=secondary,top-id=disk0,file.driver=qcow2,file.file.filename="+d.Disk+".active"+
			",file.backing.driver=qcow2,file.backing.file.filename="+d.Disk+".hidden,file.backing.backing=parent0",
		disk, "if=none,id=disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0=child0",
		"-device", "virtio-blk-pci,drive=disk0", "-incoming", fmt.Sprintf("tcp:%s:%d", hostb.LoggingAddr(), coloMigrate)))
	if err != nil {
		return c, err
	}
	if err := c.connect(ctx, hostb); err != nil {
		return c, err
	}
	boot, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if err := c.guest.WaitReady(boot); err != nil {
		return c, err
	}
	return c, nil
}

// Where each side has its monitor, and what its network card is called.
const (
	coloSocket = "/run/colo-monitor"
	coloTap    = "colo0"
	coloQEMU   = "/srv/qemu-colo"
)

type arguments map[string]any

// connect makes both QEMUs a pair, of a guest that has not begun.
func (c *colo) connect(ctx context.Context, hostb *lab.Host) error {
	capability := arguments{"capabilities": []arguments{{"capability": "x-colo", "state": true}}}
	replica := fmt.Sprintf("drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host=%s,file.port=%d,file.export=parent0,node-name=replica0",
		hostb.LoggingAddr(), coloDisk)
	for _, step := range []struct {
		side    *coloSide
		command string
		args    arguments
	}{
		{c.secondary, "migrate-set-capabilities", capability},
		{c.secondary, "nbd-server-start", arguments{"addr": arguments{"type": "inet", "data": arguments{
			"host": hostb.LoggingAddr().String(), "port": strconv.Itoa(coloDisk),
		}}}},
		{c.secondary, "nbd-server-add", arguments{"device": "parent0", "writable": true}},
		{c.primary, "human-monitor-command", arguments{"command-line": replica}},
		{c.primary, "x-blockdev-change", arguments{"parent": "disk0", "node": "replica0"}},
		{c.primary, "migrate-set-capabilities", capability},
		{c.primary, "migrate", arguments{"uri": fmt.Sprintf("tcp:%s:%d", hostb.LoggingAddr(), coloMigrate)}},
	} {
		if err := step.side.run(ctx, step.command, step.args); err != nil {
			return fmt.Errorf("COLO on %s: %w", step.side.host.Name, err)
		}
	}
	return nil
}

// startSide starts one QEMU, pins it and plugs its network card in.
func (b *benchmark) startSide(ctx context.Context, h *lab.Host, core int, args []string) (*coloSide, error) {
	s := &coloSide{host: h, ended: make(chan struct{})}
	if out, err := exec.CommandContext(ctx, "cp", "-a", b.COLO, h.Path(coloQEMU)).CombinedOutput(); err != nil {
		return s, fmt.Errorf("%w: %s", err, out)
	}
	// It ends with the lab, or by end.
	s.cmd = h.Command(context.WithoutCancel(ctx), append([]string{
		"taskset", "-c", strconv.Itoa(core), "env", "QEMU_MODULE_DIR=" + coloQEMU + "/usr/lib/x86_64-linux-gnu/qemu",
		coloQEMU + "/usr/bin/qemu-system-x86_64", "-L", coloQEMU + "/usr/share/qemu", "-L", "/usr/share/seabios",
	}, args...)...)
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	if err := s.cmd.Start(); err != nil {
		return s, err
	}
	go func() {
		_ = s.cmd.Wait()
		close(s.ended)
	}()
	var err error
	if s.monitor, err = openMonitor(ctx, h.Path(coloSocket)); err != nil {
		return s, err
	}
	_, err = h.Exec(ctx, "ip", "link", "set", coloTap, "master", lab.ServiceBridge, "up")
	return s, err
}

// words are what the QEMUs said.
func (c *colo) words(ctx context.Context) string {
	var all []string
	for _, s := range []*coloSide{c.primary, c.secondary} {
		if s == nil {
			continue
		}
		select {
		case <-s.ended:
			all = append(all, fmt.Sprintf("; the QEMU on %s ended: %s", s.host.Name, strings.TrimSpace(s.output.String())))
			continue
		case <-time.After(time.Second):
		}
		for _, q := range []string{"query-status", "query-migrate", "query-colo-status"} {
			if s.monitor == nil {
				break
			}
			answer, err := s.query(ctx, q, nil)
			all = append(all, fmt.Sprintf("; %s: %s: %s %v", s.host.Name, q, answer, err))
			if err != nil {
				break // it answers nothing else either, and each costs its time
			}
		}
	}
	return strings.Join(all, "")
}

// kill kills one side and returns when.
func (s *coloSide) kill() time.Time {
	at := time.Now()
	_ = unix.Kill(-s.cmd.Process.Pid, unix.SIGKILL)
	return at
}

// end removes the pair.
func (c *colo) end(ctx context.Context) error {
	var errs []error
	for _, s := range []*coloSide{c.primary, c.secondary} {
		if s == nil || s.cmd.Process == nil {
			continue
		}
		s.kill()
		<-s.ended
		if s.monitor != nil {
			s.close()
		}
		_, err := s.host.Exec(ctx, "/bin/sh", "-euc", `rm -f "$@"`, "sh", coloSocket, "/run/colo-compare", "/run/colo-out")
		errs = append(errs, err)
	}
	for _, h := range c.hosts() {
		errs = append(errs, os.RemoveAll(h.Path(coloQEMU)))
		files, err := filepath.Glob(h.Path(filepath.Join(lab.ImageDir, c.name)) + ".qcow2*")
		errs = append(errs, err)
		for _, f := range files {
			errs = append(errs, removeFile(f))
		}
	}
	return errors.Join(errs...)
}

func (c *colo) hosts() []*lab.Host {
	var list []*lab.Host
	for _, s := range []*coloSide{c.primary, c.secondary} {
		if s != nil {
			list = append(list, s.host)
		}
	}
	return list
}

// signal stops or continues both QEMUs whole.
func (c *colo) signal(signal unix.Signal) error {
	return errors.Join(unix.Kill(-c.primary.cmd.Process.Pid, signal), unix.Kill(-c.secondary.cmd.Process.Pid, signal))
}

// failOver kills the primary and has the secondary go on at once, as if it had
// been found dead in no time: COLO leaves that to others.
func (c *colo) failOver(ctx context.Context, traffic *Traffic) (time.Duration, error) {
	killed := c.primary.kill()
	for _, step := range []struct {
		command string
		args    arguments
	}{
		{"nbd-server-stop", nil},
		{"x-colo-lost-heartbeat", nil},
		{"object-del", arguments{"id": "redirector1"}},
		{"object-del", arguments{"id": "redirector0"}},
	} {
		if err := c.secondary.run(ctx, step.command, step.args); err != nil {
			return 0, err
		}
	}
	reply, err := traffic.WaitReply(ctx, killed, liveTimeout)
	return reply.Sub(killed), err
}
