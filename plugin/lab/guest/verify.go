// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// LineError says which record of the guest's lines is wrong and how.
type LineError struct {
	After  int    // records that were right before this one
	Text   string // the record as found
	Reason string
}

func (e *LineError) Error() string {
	return fmt.Sprintf("guest line after %d good ones: %s: %q", e.After, e.Reason, e.Text)
}

// VerifyLines reads the file that the guest appended its lines to and returns
// how many there are. Any record that is lost, repeated, altered or cut is a
// *LineError.
func VerifyLines(r io.Reader) (n int, err error) {
	buffered := bufio.NewReader(r)
	for {
		line, err := buffered.ReadString('\n')
		if errors.Is(err, io.EOF) && line == "" {
			return n, nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		if errors.Is(err, io.EOF) {
			return n, &LineError{After: n, Text: line, Reason: "cut short"}
		}
		number, err := parseLine(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return n, &LineError{After: n, Text: line, Reason: err.Error()}
		}
		if number != n+1 {
			return n, &LineError{After: n, Text: line, Reason: fmt.Sprintf("number %d instead of %d", number, n+1)}
		}
		n++
	}
}

// VerifyConsole reads a console's output, in which lines of the kernel and of
// the guest's commands may stand between the numbered ones, and returns the
// first and last number. The numbers must be consecutive from the first one
// on; a record that the console's end cuts is left out.
func VerifyConsole(r io.Reader) (first, last int, err error) {
	buffered := bufio.NewReader(r)
	for count := 0; ; {
		line, err := buffered.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return first, last, nil
		}
		if err != nil {
			return first, last, err
		}
		line = strings.TrimRight(line, "\r\n")
		if !strings.HasPrefix(line, "L ") {
			continue
		}
		number, err := parseLine(line)
		if err != nil {
			return first, last, &LineError{After: count, Text: line, Reason: err.Error()}
		}
		if count > 0 && number != last+1 {
			return first, last, &LineError{After: count, Text: line, Reason: fmt.Sprintf("number %d instead of %d", number, last+1)}
		}
		if count == 0 {
			first = number
		}
		last = number
		count++
	}
}

// parseLine checks one record, "L NUMBER MILLISECONDS CRC32", and returns its
// number. The checksum covers everything before the blank in front of it.
func parseLine(line string) (int, error) {
	cut := strings.LastIndexByte(line, ' ')
	if cut < 0 || !strings.HasPrefix(line, "L ") {
		return 0, fmt.Errorf("not a record")
	}
	want, err := strconv.ParseUint(line[cut+1:], 16, 32)
	if err != nil || len(line[cut+1:]) != 8 {
		return 0, fmt.Errorf("malformed checksum")
	}
	if got := crc32.ChecksumIEEE([]byte(line[:cut])); got != uint32(want) {
		return 0, fmt.Errorf("checksum is %08x", got)
	}
	fields := strings.Fields(line[:cut])
	if len(fields) != 3 {
		return 0, fmt.Errorf("not a record")
	}
	number, err := strconv.Atoi(fields[1])
	if err != nil || number < 1 {
		return 0, fmt.Errorf("malformed number")
	}
	return number, nil
}

// DiskLines verifies the lines on a disk image, raw or qcow2, whose guest is
// off or lost. The image itself is not touched: its journal is replayed and
// the file system checked on a copy.
func DiskLines(ctx context.Context, image string) (n int, err error) {
	err = onCopy(ctx, image, func(raw string) error {
		lines, err := run(ctx, "", "debugfs", "-R", "cat /lines", raw)
		if err != nil {
			return err
		}
		if n, err = VerifyLines(bytes.NewReader(lines)); err != nil {
			return fmt.Errorf("%s: %w", image, err)
		}
		return nil
	})
	return n, err
}

// CheckDisk demands that the file system on a disk image, raw or qcow2, has
// nothing to repair. The guest is off or lost, and the image is not touched.
func CheckDisk(ctx context.Context, image string) error {
	return onCopy(ctx, image, func(string) error { return nil })
}

// onCopy checks the file system on a raw copy of an image, and lets look have
// the copy.
func onCopy(ctx context.Context, image string, look func(raw string) error) error {
	dir, err := os.MkdirTemp("", "ftguest-disk-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	raw := filepath.Join(dir, "disk.raw")
	if _, err := run(ctx, "", "qemu-img", "convert", "-U", "-O", "raw", image, raw); err != nil {
		return err
	}
	if err := checkFS(ctx, raw); err != nil {
		return fmt.Errorf("%s: %w", image, err)
	}
	return look(raw)
}

// checkFS replays the journal as a mount would and then demands that nothing
// is left to repair.
func checkFS(ctx context.Context, raw string) error {
	if _, err := run(ctx, "", "e2fsck", "-E", "journal_only", "-p", raw); err != nil {
		return err
	}
	if _, err := run(ctx, "", "e2fsck", "-fn", raw); err != nil {
		return err
	}
	return nil
}
