// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ftvirt.org/ftvirt/arbiter"
	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
	"ftvirt.org/ftvirt/plugin/channel"
	"ftvirt.org/ftvirt/plugin/pair"
	"ftvirt.org/ftvirt/plugin/virt"
)

// definable is a domain of libvirt's test driver; mib is what an operator edits.
func definable(id plugin.UUID, mib int, metadata string) string {
	return fmt.Sprintf("<domain type='test'><name>d%s</name><uuid>%s</uuid><metadata>%s</metadata>"+
		"<memory unit='MiB'>%d</memory><vcpu>1</vcpu><os><type>hvm</type></os></domain>", id, id, metadata, mib)
}

const wished = `<ft:pair xmlns:ft="urn:ftvirt:domain:1" mode="protected" peer="hostb"/>`

// definingAgent is an agent with an arbiter and libvirt's test driver.
func definingAgent(t *testing.T) *Agent {
	t.Helper()
	a := testAgent(t)
	if _, err := arbiter.InitDir(t.Context(), arbiter.DirConfig{Path: a.cfg.Arbiter.Path}); err != nil {
		t.Fatal(err)
	}
	var err error
	if a.virt, err = virt.Open("test:///default", virt.Events{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.virt.Close)
	var cancel context.CancelFunc
	a.ctx, cancel = context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		a.wg.Wait()
	})
	return a
}

// connect makes a session whose far end serves requests.
func connect(t *testing.T, handlers channel.Handlers) (near, far *channel.Conn) {
	t.Helper()
	a, b := net.Pipe()
	near, err := channel.NewConn(a, channel.DefaultConfig(), nil)
	if err != nil {
		t.Fatal(err)
	}
	far, err = channel.NewConn(b, channel.DefaultConfig(), handlers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = near.Close()
		_ = far.Close()
	})
	return near, far
}

// An edit is told of at once and, if there is no session, with the next one.
func TestDefinitionIsTold(t *testing.T) {
	t.Parallel()
	a := definingAgent(t)
	id := plugin.UUID{0xd, 1}
	edit := func(mib int) {
		t.Helper()
		if _, err := a.virt.Define(t.Context(), definable(id, mib, wished)); err != nil {
			t.Fatal(err)
		}
	}
	d := newDomain(a, id)
	d.status = pair.Status{State: pair.Protected, Role: plugin.RolePrimary, Epoch: 3}
	p := &primary{d: d, epoch: 3, peer: "hostb"}
	var stop context.CancelFunc
	p.ctx, stop = context.WithCancel(t.Context())
	defer stop()
	told := make(chan definitionRequest, 8)
	session := func(refusal string) *channel.Conn {
		near, far := connect(t, channel.Handlers{methodDefinition: handler(func(_ context.Context, r definitionRequest) (any, error) {
			told <- r
			return definitionReply{Problem: refusal}, nil
		})})
		go func() { _, _ = far.Receive(t.Context()) }()
		go func() { _, _ = near.Receive(t.Context()) }()
		a.wg.Go(func() { p.tellDefinition(near) })
		return near
	}
	want := func(mib int) {
		t.Helper()
		select {
		case r := <-told:
			if !strings.Contains(r.XML, fmt.Sprintf(">%d<", mib<<10)) || r.Epoch != 3 || r.Autostart {
				t.Fatalf("told %+v, want %d MiB", r, mib)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of %d MiB", mib)
		}
	}
	edit(100)
	first := session("")
	want(100)
	d.kick()
	edit(101)
	d.kick()
	want(101)
	_ = first.Close()
	edit(102)
	d.kick()
	second := session("no such image")
	want(102)
	says := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); d.report().Definition != want; {
			if time.Now().After(deadline) {
				t.Fatalf("status says %q, want %q", d.report().Definition, want)
			}
			<-time.After(time.Millisecond)
		}
	}
	kept := "host hostb keeps to the former, which would count after a failover: no such image"
	says(kept)
	// What fails is shown as long as it does.
	if err := d.keepDefinition(&keptDefinition{Epoch: 2}); err != nil {
		t.Fatal(err)
	}
	d.kick()
	says("that of this host is yet to be made; " + kept)
	if err := d.dropDefinition(2); err != nil {
		t.Fatal(err)
	}
	d.kick()
	says(kept)
	if len(told) != 0 {
		t.Errorf("told again: %+v", <-told)
	}
	_ = second.Close()
}

// What a backup's host keeps is of its epoch, can be had here, and lasts until it
// is libvirt's or nobody's.
func TestKeptDefinition(t *testing.T) {
	t.Parallel()
	a := definingAgent(t)
	a.cfg.Host = "hostb"
	live, err := os.ReadFile("../../hooks/testdata/live.xml")
	if err != nil {
		t.Fatal(err)
	}
	dom, err := hooks.Parse(live)
	if err != nil {
		t.Fatal(err)
	}
	id, err := plugin.ParseUUID(dom.UUID)
	if err != nil {
		t.Fatal(err)
	}
	d := newDomain(a, id)
	b := d.newBackup("hosta", 4)
	defer b.cancel()
	take := func(epoch plugin.Epoch, change ...string) (string, error) {
		reply, err := b.takeDefinition(t.Context(), definitionRequest{Epoch: epoch, XML: strings.NewReplacer(change...).Replace(string(live)), Autostart: true})
		r, _ := reply.(definitionReply)
		return r.Problem, err
	}
	if _, err := take(4); !errors.Is(err, migrate.ErrEpoch) {
		t.Errorf("before there is a backup: %v", err)
	}
	disks := map[string]string{}
	for _, target := range []string{"vda", "vdb"} {
		disks[target] = filepath.Join(t.TempDir(), target)
		if err := os.WriteFile(disks[target], nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.keepReplicas(string(live), disks); err != nil {
		t.Fatal(err)
	}
	if problem, err := take(4, ">524288<", ">600000<"); err != nil || problem != "" {
		t.Fatal(problem, err)
	}
	for change, says := range map[string]string{"images/vda.img": "another image", "dev='vdb'": "no replica"} {
		edited := strings.NewReplacer("vda.img", "other.img", "vdb", "vdz").Replace(change)
		if problem, err := take(4, change, edited, ">524288<", ">700000<"); err != nil || !strings.Contains(problem, says) {
			t.Errorf("%s: %q, %v", change, problem, err)
		}
	}
	if _, err := take(5); !errors.Is(err, migrate.ErrEpoch) {
		t.Errorf("of another epoch: %v", err)
	}
	k, err := newDomain(a, id).kept() // as the next agent does
	if err != nil || k == nil || k.Epoch != 4 || k.Autostart == nil || !*k.Autostart {
		t.Fatalf("%+v, %v", k, err)
	}
	def, err := k.domain(a.hookOptions())
	if err != nil || def.Memory.Value != 600000 || def.Devices.Disks[0].Source.File.File != disks["vda"] {
		t.Errorf("%v", err)
	}
	b.leave()
	if _, err := take(4); !errors.Is(err, errLeaving) {
		t.Errorf("from a primary that is taken for dead: %v", err)
	}
	if err := d.dropDefinition(3); err != nil {
		t.Error(err)
	}
	if k, err := d.kept(); k == nil || err != nil {
		t.Errorf("gone with an epoch before its own: %v", err)
	}
	if err := errors.Join(d.dropDefinition(4), d.dropDefinition(4)); err != nil {
		t.Error(err)
	}
	if k, err := d.kept(); k != nil || err != nil {
		t.Errorf("still there: %+v, %v", k, err)
	}
	if err := os.WriteFile(d.keptPath(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.define(t.Context(), arbiter.Record{Epoch: 5}); err != nil {
		t.Error(err)
	}
	if k, err := d.kept(); k != nil || err != nil {
		t.Errorf("damaged, and still there: %+v, %v", k, err)
	}
}

// Whose the domain is decides what becomes of what is kept, and of autostart.
func TestOwnerDefines(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		host             string
		owner            string // of epoch 1, which hosta has as its primary
		done, kept, auto bool
	}{
		"stale here":                    {"hosta", "hostb", true, false, false},
		"ours":                          {"hosta", "hosta", true, false, true},
		"undecided, the primary's host": {"hosta", "", false, false, true},
		"undecided, the backup's host":  {"hostb", "", false, true, false},
		"the backup was lost":           {"hostb", "hosta", true, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := definingAgent(t)
			a.cfg.Host = tc.host
			id := plugin.UUID{0xd, 2, byte(len(name))}
			epoch, err := a.arbiter.Open(t.Context(), id, "hosta", "hostb")
			if err == nil && tc.owner != "" {
				err = a.arbiter.Acquire(t.Context(), id, epoch, tc.owner)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := a.virt.Define(t.Context(), definable(id, 100, wished)); err != nil {
				t.Fatal(err)
			}
			if err := a.virt.SetAutostart(t.Context(), id, true); err != nil {
				t.Fatal(err)
			}
			d := newDomain(a, id)
			of := epoch
			if tc.host == "hosta" {
				of = 0 // of a backup of before, which never went live
			}
			if err := d.keepDefinition(&keptDefinition{Epoch: of, Primary: "hostc", Live: "<domain"}); err != nil {
				t.Fatal(err)
			}
			done, err := d.defineHere(t.Context())
			if err != nil || done != tc.done {
				t.Errorf("done: %v, %v", done, err)
			}
			if k, err := d.kept(); (k != nil) != tc.kept || err != nil {
				t.Errorf("kept: %+v, %v", k, err)
			}
			if auto, err := a.virt.Autostart(t.Context(), id); auto != tc.auto || err != nil {
				t.Errorf("autostart: %v, %v", auto, err)
			}
		})
	}
}

// A copy that went live under an earlier version was defined by it, and its
// annotation left as it was: what was edited since stays. A definition of another
// copy, whose disks are old, does not.
func TestDefinedByAnEarlierVersion(t *testing.T) {
	t.Parallel()
	a := definingAgent(t)
	for image, kept := range map[string]bool{"new": true, "old": false} {
		id := plugin.UUID{0xd, 3, image[0]}
		describe := func(mib int, metadata, image string) string {
			return strings.Replace(definable(id, mib, metadata), "</domain>", "<devices><disk type='file'><source file='/nonexistent/"+image+"'/>"+
				"<target dev='vda'/></disk></devices></domain>", 1)
		}
		backup := hooks.Annotation{Mode: hooks.ModeProtected, Role: plugin.RoleBackup, Epoch: 1, Peer: "hosta"}.String()
		_, err := a.virt.Define(t.Context(), describe(100, backup, "new"))
		if err == nil {
			err = a.virt.Start(t.Context(), id)
		}
		if err == nil {
			_, err = a.virt.Define(t.Context(), describe(200, wished, image))
		}
		if err != nil {
			t.Fatal(err)
		}
		d := newDomain(a, id)
		// What is not transformed cannot be made a definition of, so that it is seen
		// whether that is tried.
		err = d.define(t.Context(), arbiter.Record{Epoch: 1, Primary: "hosta", Backup: "hostb", Owner: "hostb"})
		if (err == nil) != kept {
			t.Errorf("with disk %s: %v", image, err)
		}
	}
}
