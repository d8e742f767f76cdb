// SPDX-License-Identifier: Apache-2.0

// Package virt is the only package that speaks to libvirt. Each call has a
// time limit: one that libvirtd or a QEMU does not answer is left behind and
// fails with ErrTimeout, so that no caller waits for a blocked monitor.
package virt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"libvirt.org/go/libvirt"

	"ftvirt.org/ftvirt/plugin"
)

// Errors of this package; libvirt's own are wrapped as libvirt.Error.
var (
	ErrTimeout  = errors.New("libvirt did not answer in time")
	ErrNoDomain = errors.New("no such domain")
	ErrBusy     = errors.New("too many libvirt calls are left unanswered")
	ErrMonitor  = errors.New("QEMU monitor")
)

// DefaultTimeout bounds a call whose context has no deadline.
const DefaultTimeout = 10 * time.Second

// maxStuck is how many unanswered calls are tolerated before further ones fail
// at once; each holds a thread.
const maxStuck = 32

// Info is what the agent needs to know of a domain.
type Info struct {
	UUID       plugin.UUID
	Name       string
	Active     bool // it has a QEMU
	Running    bool // and its vCPU is not paused
	Persistent bool
}

// Stopped tells how a domain ended.
type Stopped struct {
	UUID plugin.UUID
	Name string
	// Deliberate: somebody wanted that. The guest shut itself down, or an operator
	// had libvirt destroy or save it. A QEMU that crashed, or that somebody else
	// sent a signal to, was not wanted to end.
	Deliberate bool
	Detail     string
}

// DiskError tells that a request to a disk failed.
type DiskError struct {
	UUID   plugin.UUID
	Path   string // of the image, empty if that is not known
	Reason string // "enospc", or empty
	// Told: the guest was told of the error; else its QEMU is paused for it.
	Told bool
}

// Events are called from libvirt's event loop: they must not block, and must
// not call libvirt.
type Events struct {
	Started         func(Info)
	Stopped         func(Stopped)
	MetadataChanged func(plugin.UUID)
	DiskFailed      func(DiskError)
	// DefinitionChanged: it was defined, or its definition was removed.
	DefinitionChanged func(plugin.UUID)
	// Reconnected is called after libvirtd came back.
	Reconnected func()
}

var startLoop = sync.OnceValue(func() error {
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return err
	}
	go func() {
		for {
			// It returns an error only when one iteration failed.
			_ = libvirt.EventRunDefaultImpl()
		}
	}()
	return nil
})

// Conn is a connection to one libvirtd that is made again when it breaks.
type Conn struct {
	uri    string
	events Events
	stuck  chan struct{}
	// connecting is full while one call connects, which a libvirtd that hangs
	// makes last: the others wait for it as long as they have time.
	connecting chan struct{}

	mu     sync.Mutex // not held while libvirt is waited for
	conn   *libvirt.Connect
	closed bool

	endsMu sync.Mutex
	ends   map[plugin.UUID]bool // of domains that are shutting down: by their host
}

// Open prepares a connection to the libvirtd at uri, which need not answer yet:
// the first call connects. See Keep.
func Open(uri string, events Events) (*Conn, error) {
	if err := startLoop(); err != nil {
		return nil, fmt.Errorf("libvirt event loop: %w", err)
	}
	return &Conn{uri: uri, events: events, stuck: make(chan struct{}, maxStuck), connecting: make(chan struct{}, 1), ends: map[plugin.UUID]bool{}}, nil
}

// Keep connects, and again after the connection broke, until ctx ends, so that
// events come though nobody calls. It tells each change: nil once libvirt can be
// asked, or why it cannot.
func (c *Conn) Keep(ctx context.Context, told func(error)) {
	t := time.NewTicker(keepPeriod)
	defer t.Stop()
	for last := "never tried"; ; {
		_, err := call(ctx, c, "connect", func(*libvirt.Connect) (struct{}, error) { return struct{}{}, nil })
		if ctx.Err() != nil {
			return
		}
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text != last {
			last = text
			told(err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// keepPeriod is between two looks at the connection.
const keepPeriod = time.Second

// Close ends the connection; domains stay as they are. It does not wait for a
// libvirtd that hangs.
func (c *Conn) Close() {
	c.mu.Lock()
	conn := c.conn
	c.conn, c.closed = nil, true
	c.mu.Unlock()
	if conn == nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = conn.Close()
	}()
	t := time.NewTimer(closeTimeout)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// closeTimeout bounds saying good-bye.
const closeTimeout = 500 * time.Millisecond

var errClosed = errors.New("the connection to libvirt was closed")

// current gives the connection as what it is: one that lives or a dead one.
func (c *Conn) current() (live, dead *libvirt.Connect) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil, nil
	}
	if alive, err := c.conn.IsAlive(); err == nil && alive {
		return c.conn, nil
	}
	return nil, c.conn
}

// get returns a live connection. It may block in libvirt, so it runs inside a
// call's goroutine only.
func (c *Conn) get(ctx context.Context) (*libvirt.Connect, error) {
	if live, _ := c.current(); live != nil {
		return live, nil
	}
	select {
	case c.connecting <- struct{}{}:
		defer func() { <-c.connecting }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	live, dead := c.current()
	if live != nil {
		return live, nil // of the call that was waited for
	}
	if dead != nil {
		_, _ = dead.Close()
	}
	conn, err := libvirt.NewConnect(c.uri)
	if err != nil {
		return nil, err
	}
	// Five unanswered probes, one a second, end the connection. libvirt's test
	// driver has nobody to probe.
	if err := conn.SetKeepAlive(1, 5); err != nil && !errors.Is(err, libvirt.ERR_NO_SUPPORT) {
		_, _ = conn.Close()
		return nil, err
	}
	if err := c.register(conn); err != nil {
		_, _ = conn.Close()
		return nil, err
	}
	c.mu.Lock()
	closed := c.closed
	if !closed {
		c.conn = conn
	}
	c.mu.Unlock()
	if closed {
		_, _ = conn.Close()
		return nil, errClosed
	}
	if c.events.Reconnected != nil {
		c.events.Reconnected()
	}
	return conn, nil
}

func (c *Conn) register(conn *libvirt.Connect) error {
	_, err := conn.DomainEventLifecycleRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventLifecycle) {
		c.lifecycle(d, e)
	})
	if err != nil {
		return err
	}
	_, err = conn.DomainEventMetadataChangeRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, _ *libvirt.DomainEventMetadataChange) {
		if id, err := uuidOf(d); err == nil && c.events.MetadataChanged != nil {
			c.events.MetadataChanged(id)
		}
	})
	if err != nil {
		return err
	}
	_, err = conn.DomainEventIOErrorReasonRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventIOErrorReason) {
		if id, err := uuidOf(d); err == nil && c.events.DiskFailed != nil {
			c.events.DiskFailed(DiskError{UUID: id, Path: e.SrcPath, Reason: e.Reason, Told: e.Action == libvirt.DOMAIN_EVENT_IO_ERROR_REPORT})
		}
	})
	return err
}

func (c *Conn) lifecycle(d *libvirt.Domain, e *libvirt.DomainEventLifecycle) {
	id, err := uuidOf(d)
	if err != nil {
		return
	}
	name, _ := d.GetName()
	switch e.Event {
	case libvirt.DOMAIN_EVENT_DEFINED, libvirt.DOMAIN_EVENT_UNDEFINED:
		if c.events.DefinitionChanged != nil {
			c.events.DefinitionChanged(id)
		}
	case libvirt.DOMAIN_EVENT_SHUTDOWN:
		c.shuttingDown(id, libvirt.DomainEventShutdownDetailType(e.Detail) == libvirt.DOMAIN_EVENT_SHUTDOWN_HOST)
	case libvirt.DOMAIN_EVENT_STARTED:
		c.byHost(id) // what is left of a run before
		if c.events.Started != nil {
			c.events.Started(Info{UUID: id, Name: name, Active: true})
		}
	case libvirt.DOMAIN_EVENT_STOPPED:
		byHost := c.byHost(id)
		if c.events.Stopped == nil {
			return
		}
		detail := libvirt.DomainEventStoppedDetailType(e.Detail)
		c.events.Stopped(Stopped{
			UUID: id, Name: name, Detail: stoppedDetail(detail),
			Deliberate: deliberate(detail, byHost),
		})
	}
}

// deliberate tells whether somebody wanted an end, of which libvirt says the same
// whether the guest or a signal began it.
func deliberate(d libvirt.DomainEventStoppedDetailType, byHost bool) bool {
	switch d {
	case libvirt.DOMAIN_EVENT_STOPPED_CRASHED, libvirt.DOMAIN_EVENT_STOPPED_FAILED:
		return false
	case libvirt.DOMAIN_EVENT_STOPPED_SHUTDOWN:
		return !byHost
	default:
		return true
	}
}

// shuttingDown notes who began the end of a domain; the first to do so counts.
func (c *Conn) shuttingDown(id plugin.UUID, byHost bool) {
	c.endsMu.Lock()
	defer c.endsMu.Unlock()
	if _, ok := c.ends[id]; !ok {
		c.ends[id] = byHost
	}
}

// byHost gives that, and forgets it.
func (c *Conn) byHost(id plugin.UUID) bool {
	c.endsMu.Lock()
	defer c.endsMu.Unlock()
	host := c.ends[id]
	delete(c.ends, id)
	return host
}

func stoppedDetail(d libvirt.DomainEventStoppedDetailType) string {
	switch d {
	case libvirt.DOMAIN_EVENT_STOPPED_SHUTDOWN:
		return "shut down"
	case libvirt.DOMAIN_EVENT_STOPPED_DESTROYED:
		return "destroyed"
	case libvirt.DOMAIN_EVENT_STOPPED_CRASHED:
		return "crashed"
	case libvirt.DOMAIN_EVENT_STOPPED_MIGRATED:
		return "migrated"
	case libvirt.DOMAIN_EVENT_STOPPED_SAVED:
		return "saved"
	case libvirt.DOMAIN_EVENT_STOPPED_FAILED:
		return "failed"
	default:
		return fmt.Sprintf("stopped (detail %d)", d)
	}
}

func uuidOf(d *libvirt.Domain) (plugin.UUID, error) {
	var id plugin.UUID
	raw, err := d.GetUUID()
	if err != nil {
		return id, err
	}
	copy(id[:], raw)
	return id, nil
}

// call runs f with a connection, in a goroutine that is left behind when ctx
// or the time limit ends first.
func call[T any](ctx context.Context, c *Conn, what string, f func(*libvirt.Connect) (T, error)) (T, error) {
	var zero T
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DefaultTimeout)
		defer cancel()
	}
	select {
	case c.stuck <- struct{}{}:
	default:
		return zero, fmt.Errorf("%s: %w", what, ErrBusy)
	}
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-c.stuck }()
		conn, err := c.get(ctx)
		if err == nil {
			// What the caller gave up waiting for must not be done later, as
			// when a libvirtd that hung goes on: it may be wrong by then.
			err = ctx.Err()
		}
		var v T
		if err == nil {
			v, err = f(conn)
		}
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		if errors.Is(r.err, libvirt.ERR_NO_DOMAIN) {
			return zero, fmt.Errorf("%s: %w", what, ErrNoDomain)
		}
		if r.err != nil {
			return zero, fmt.Errorf("%s: %w", what, r.err)
		}
		return r.v, nil
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return zero, fmt.Errorf("%s: %w", what, ErrTimeout)
		}
		return zero, fmt.Errorf("%s: %w", what, ctx.Err())
	}
}

// withDomain runs f on a domain and frees it.
func withDomain[T any](ctx context.Context, c *Conn, id plugin.UUID, what string, f func(*libvirt.Domain) (T, error)) (T, error) {
	return call(ctx, c, what, func(conn *libvirt.Connect) (T, error) {
		d, err := conn.LookupDomainByUUID(id[:])
		if err != nil {
			var zero T
			return zero, err
		}
		defer func() { _ = d.Free() }()
		return f(d)
	})
}

func info(d *libvirt.Domain) (Info, error) {
	var i Info
	var err error
	if i.UUID, err = uuidOf(d); err != nil {
		return i, err
	}
	if i.Name, err = d.GetName(); err != nil {
		return i, err
	}
	if i.Persistent, err = d.IsPersistent(); err != nil {
		return i, err
	}
	state, _, err := d.GetState()
	if err != nil {
		return i, err
	}
	i.Active = state != libvirt.DOMAIN_SHUTOFF && state != libvirt.DOMAIN_CRASHED && state != libvirt.DOMAIN_NOSTATE
	i.Running = state == libvirt.DOMAIN_RUNNING || state == libvirt.DOMAIN_BLOCKED
	return i, nil
}

// Find looks a domain up by name or by UUID, as virsh does.
func (c *Conn) Find(ctx context.Context, name string) (Info, error) {
	return call(ctx, c, "domain "+name, func(conn *libvirt.Connect) (Info, error) {
		d, err := conn.LookupDomainByName(name)
		if id, perr := plugin.ParseUUID(name); err != nil && perr == nil {
			d, err = conn.LookupDomainByUUID(id[:])
		}
		if err != nil {
			return Info{}, err
		}
		defer func() { _ = d.Free() }()
		return info(d)
	})
}

// Lookup tells about one domain.
func (c *Conn) Lookup(ctx context.Context, id plugin.UUID) (Info, error) {
	return withDomain(ctx, c, id, "domain "+id.String(), info)
}

// List gives all domains, running or not.
func (c *Conn) List(ctx context.Context) ([]Info, error) {
	return call(ctx, c, "list domains", func(conn *libvirt.Connect) ([]Info, error) {
		all, err := conn.ListAllDomains(0)
		if err != nil {
			return nil, err
		}
		var list []Info
		for i := range all {
			d, err := info(&all[i])
			_ = all[i].Free()
			if err == nil {
				list = append(list, d)
			}
		}
		return list, nil
	})
}

// XML gives the domain's description: of the running domain, or with inactive
// of the persistent definition. Passwords are in it.
func (c *Conn) XML(ctx context.Context, id plugin.UUID, inactive bool) (string, error) {
	return c.xml(ctx, id, inactive, libvirt.DOMAIN_XML_SECURE)
}

// PublicXML gives the same without passwords.
func (c *Conn) PublicXML(ctx context.Context, id plugin.UUID, inactive bool) (string, error) {
	return c.xml(ctx, id, inactive, 0)
}

func (c *Conn) xml(ctx context.Context, id plugin.UUID, inactive bool, flags libvirt.DomainXMLFlags) (string, error) {
	if inactive {
		flags |= libvirt.DOMAIN_XML_INACTIVE
	}
	return withDomain(ctx, c, id, "description of "+id.String(), func(d *libvirt.Domain) (string, error) {
		return d.GetXMLDesc(flags)
	})
}

// Descriptions gives all that libvirt has written down of its domains: what runs,
// definitions, what a saved domain will be, and snapshots. It is complete, or an
// error.
func (c *Conn) Descriptions(ctx context.Context) ([]string, error) {
	return call(ctx, c, "descriptions of all domains", func(conn *libvirt.Connect) ([]string, error) {
		all, err := conn.ListAllDomains(0)
		if err != nil {
			return nil, err
		}
		var texts []string
		for i := range all {
			more, err := descriptions(&all[i])
			if err != nil && !errors.Is(err, libvirt.ERR_NO_DOMAIN) { // it ended meanwhile
				return nil, err
			}
			texts = append(texts, more...)
			_ = all[i].Free()
		}
		return texts, nil
	})
}

func descriptions(d *libvirt.Domain) ([]string, error) {
	var texts []string
	for _, get := range []func() (string, error){
		func() (string, error) { return d.GetXMLDesc(0) },
		func() (string, error) { return d.GetXMLDesc(libvirt.DOMAIN_XML_INACTIVE) },
		func() (string, error) {
			if saved, err := d.HasManagedSaveImage(0); err != nil || !saved {
				return "", err
			}
			return d.ManagedSaveGetXMLDesc(0)
		},
	} {
		text, err := get()
		if err != nil && !errors.Is(err, libvirt.ERR_NO_SUPPORT) {
			return nil, err
		}
		texts = append(texts, text)
	}
	snapshots, err := d.ListAllSnapshots(0)
	if err != nil && !errors.Is(err, libvirt.ERR_NO_SUPPORT) {
		return nil, err
	}
	for i := range snapshots {
		text, err := snapshots[i].GetXMLDesc(0)
		_ = snapshots[i].Free()
		if err != nil && !errors.Is(err, libvirt.ERR_NO_DOMAIN_SNAPSHOT) {
			return nil, err
		}
		texts = append(texts, text)
	}
	return texts, nil
}

// Define makes or replaces a persistent definition.
func (c *Conn) Define(ctx context.Context, xml string) (Info, error) {
	return call(ctx, c, "define", func(conn *libvirt.Connect) (Info, error) {
		d, err := conn.DomainDefineXMLFlags(xml, libvirt.DOMAIN_DEFINE_VALIDATE)
		if err != nil {
			return Info{}, err
		}
		defer func() { _ = d.Free() }()
		return info(d)
	})
}

// Autostart tells whether a persistent domain starts with its host.
func (c *Conn) Autostart(ctx context.Context, id plugin.UUID) (bool, error) {
	return withDomain(ctx, c, id, "autostart of "+id.String(), func(d *libvirt.Domain) (bool, error) { return d.GetAutostart() })
}

// SetAutostart says whether a persistent domain is to start with its host.
func (c *Conn) SetAutostart(ctx context.Context, id plugin.UUID, on bool) error {
	_, err := withDomain(ctx, c, id, "autostart of "+id.String(), func(d *libvirt.Domain) (struct{}, error) {
		return struct{}{}, d.SetAutostart(on)
	})
	return err
}

// Create starts a transient domain, paused.
func (c *Conn) Create(ctx context.Context, xml string) (Info, error) {
	return call(ctx, c, "create", func(conn *libvirt.Connect) (Info, error) {
		d, err := conn.DomainCreateXML(xml, libvirt.DOMAIN_START_PAUSED)
		if err != nil {
			return Info{}, err
		}
		defer func() { _ = d.Free() }()
		return info(d)
	})
}

// Undefine removes a persistent definition. A domain that has none is no error.
func (c *Conn) Undefine(ctx context.Context, id plugin.UUID) error {
	_, err := withDomain(ctx, c, id, "undefine "+id.String(), func(d *libvirt.Domain) (struct{}, error) {
		return struct{}{}, d.Undefine()
	})
	if errors.Is(err, ErrNoDomain) {
		return nil
	}
	return err
}

// Start starts a persistent domain.
func (c *Conn) Start(ctx context.Context, id plugin.UUID) error {
	_, err := withDomain(ctx, c, id, "start "+id.String(), func(d *libvirt.Domain) (struct{}, error) {
		return struct{}{}, d.Create()
	})
	return err
}

// Destroy ends the domain's QEMU at once. A domain that is not running is no
// error.
func (c *Conn) Destroy(ctx context.Context, id plugin.UUID) error {
	_, err := withDomain(ctx, c, id, "destroy "+id.String(), func(d *libvirt.Domain) (struct{}, error) {
		return struct{}{}, d.Destroy()
	})
	if errors.Is(err, ErrNoDomain) || errors.Is(err, libvirt.ERR_OPERATION_INVALID) {
		return nil
	}
	return err
}

// Resume lets a domain run whose QEMU was paused.
func (c *Conn) Resume(ctx context.Context, id plugin.UUID) error {
	_, err := withDomain(ctx, c, id, "resume "+id.String(), func(d *libvirt.Domain) (struct{}, error) {
		return struct{}{}, d.Resume()
	})
	return err
}

// SetMetadata writes the element of a namespace, in the running domain and, if
// it has one, in its persistent definition; an empty xml removes it.
func (c *Conn) SetMetadata(ctx context.Context, i Info, key, uri, xml string) error {
	flags := libvirt.DOMAIN_AFFECT_CURRENT
	if i.Persistent {
		flags = libvirt.DOMAIN_AFFECT_CONFIG
		if i.Active {
			flags |= libvirt.DOMAIN_AFFECT_LIVE
		}
	}
	_, err := withDomain(ctx, c, i.UUID, "metadata of "+i.Name, func(d *libvirt.Domain) (struct{}, error) {
		return struct{}{}, d.SetMetadata(libvirt.DOMAIN_METADATA_ELEMENT, xml, key, uri, flags)
	})
	return err
}

// Monitor sends one QMP command through libvirt and decodes what it returns
// into out, unless that is nil. An error of QEMU wraps ErrMonitor.
// See https://libvirt.org/html/libvirt-libvirt-qemu.html#virDomainQemuMonitorCommand
func (c *Conn) Monitor(ctx context.Context, id plugin.UUID, command string, args, out any) error {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	answer, err := withDomain(ctx, c, id, command, func(d *libvirt.Domain) (string, error) {
		return d.QemuMonitorCommand(string(request), libvirt.DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)
	})
	if err != nil {
		return err
	}
	var reply struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(answer), &reply); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if reply.Error != nil {
		return fmt.Errorf("%w: %s: %s", ErrMonitor, command, reply.Error.Desc)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(reply.Return, out); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// Hypervisor gives the version of the QEMU that libvirt runs, as "10.0.2".
func (c *Conn) Hypervisor(ctx context.Context) (string, error) {
	return call(ctx, c, "version of QEMU", func(conn *libvirt.Connect) (string, error) {
		v, err := conn.GetVersion()
		return fmt.Sprintf("%d.%d.%d", v/1000000, v/1000%1000, v%1000), err
	})
}

// Library gives the version of libvirt that serves, as "11.3.0".
func (c *Conn) Library(ctx context.Context) (string, error) {
	return call(ctx, c, "version of libvirt", func(conn *libvirt.Connect) (string, error) {
		v, err := conn.GetLibVersion()
		return fmt.Sprintf("%d.%d.%d", v/1000000, v/1000%1000, v%1000), err
	})
}

// Memory is how much memory a running domain has, in bytes.
func (c *Conn) Memory(ctx context.Context, id plugin.UUID) (int64, error) {
	return withDomain(ctx, c, id, "memory of "+id.String(), func(d *libvirt.Domain) (int64, error) {
		kib, err := d.GetMaxMemory()
		return int64(kib) << 10, err
	})
}

// Snapshots counts the snapshots of a domain.
func (c *Conn) Snapshots(ctx context.Context, id plugin.UUID) (int, error) {
	return withDomain(ctx, c, id, "snapshots of "+id.String(), func(d *libvirt.Domain) (int, error) {
		return d.SnapshotNum(0)
	})
}
