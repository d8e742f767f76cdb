// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"ftvirt.org/ftvirt/hooks"
	"ftvirt.org/ftvirt/migrate"
	"ftvirt.org/ftvirt/plugin"
)

// newReplicas gives what cares for the files of this host's backups.
func (a *Agent) newReplicas() *migrate.Replicas {
	return &migrate.Replicas{
		Host: a.cfg.Host, Dir: a.cfg.Clone.DiskDir, Records: filepath.Join(a.cfg.Agent.StateDir, "replicas"),
		Described: a.descriptions, Log: a.log,
	}
}

// descriptions are all of this host's domains that there are or are yet to be made.
func (a *Agent) descriptions(ctx context.Context) ([]string, error) {
	texts, err := a.virt.Descriptions(ctx)
	if err != nil {
		return nil, err
	}
	kept, err := filepath.Glob(filepath.Join(a.definitionDir(), "*"))
	if err != nil {
		return nil, err
	}
	for _, path := range kept {
		text, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		texts = append(texts, string(text))
	}
	return texts, nil
}

// seed implements migrate.Receiver.Seed: the disk of the domain as this host's
// definition has it, from when it ran here last.
func (d *domain) seed(ctx context.Context, disk migrate.Disk) migrate.Seed {
	ctx, cancel := context.WithTimeout(ctx, seedTimeout)
	defer cancel()
	info, err := d.a.virt.Lookup(ctx, d.id)
	if err != nil || !info.Persistent || info.Active {
		return nil
	}
	text, err := d.a.virt.XML(ctx, d.id, true)
	if err != nil {
		return nil
	}
	dom, err := hooks.Parse([]byte(text))
	if err != nil || dom.Devices == nil {
		return nil
	}
	for _, x := range dom.Devices.Disks {
		i, ok := imageOf(x)
		if !ok || i.target != disk.Target {
			continue
		}
		c, err := i.open(ctx)
		if err != nil {
			d.a.log.Info("the disk goes over the network whole", "domain", d.label(), "disk", disk.Target, "error", err)
			return nil
		}
		return c
	}
	return nil
}

// seedTimeout bounds the look at an image's tables.
const seedTimeout = 15 * time.Second

// forgetRequest names the domain whose kept replicas may go.
type forgetRequest struct {
	Domain plugin.UUID `json:"domain"`
}

// forgetReplicas tells the peers, once the domain has no backup any more, that
// it shall have none.
func (d *domain) forgetReplicas(ctx context.Context) {
	if err := d.untilAlone(ctx); err != nil {
		return // they age
	}
	for name := range d.a.cfg.Peers {
		if name == d.a.cfg.Host {
			continue
		}
		d.a.wg.Go(func() {
			if err := d.a.ask(ctx, name, methodForget, forgetRequest{d.id}, nil); err != nil && ctx.Err() == nil {
				d.a.log.Info("a peer may keep replicas of the domain's disks for a while", "domain", d.label(), "peer", name, "error", err)
			}
		})
	}
}

// forget deletes what is kept for a domain's next backup.
func (a *Agent) forget(ctx context.Context, id plugin.UUID) error {
	if id == (plugin.UUID{}) {
		return nil
	}
	a.mu.Lock()
	d := a.domains[id]
	a.mu.Unlock()
	if d != nil {
		_, _ = d.untilFree(ctx) // the last backup may be on its way out
	}
	return a.replicas.Forget(ctx, id, 0)
}

// stalePeriod is between two looks for replicas that were kept for too long.
const stalePeriod = time.Hour

// age deletes replicas of discarded backups that nobody wanted for long.
func (a *Agent) age(ctx context.Context) {
	if s, err := a.replicas.Strangers(ctx); err == nil && len(s.Unproven) > 0 {
		a.log.Warn("files that look like replicas are left alone, since nothing proves that this host made them; "+
			"delete them by hand once no domain of any host uses them", "files", s.Unproven)
	}
	t := time.NewTicker(stalePeriod)
	defer t.Stop()
	for {
		if err := a.replicas.Forget(ctx, plugin.UUID{}, a.cfg.Clone.KeepReplicas); err != nil {
			a.log.Warn("old replicas stay", "error", err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
