package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	v1 "github.com/keycustody/custodian/api/custodian/v1"
)

func (a *app) backupCmd() *cobra.Command {
	return group(&cobra.Command{
		Use:   "backup",
		Short: "Back up the store of a running daemon",
		Long: `Back up the store of a running daemon. A backup is encrypted to an age X25519
public key (https://age-encryption.org/v1); whoever has the private key can open
it, but not the keys in it: these are still wrapped by the HSM. custodiand restore
puts a backup back.`,
	}, a.backupCreateCmd(), a.backupVerifyCmd(), a.backupKeygenCmd())
}

// A backupView is a backup in JSON.
type backupView struct {
	File       string   `json:"file"`
	Bytes      int64    `json:"bytes"`
	SHA256     hexBytes `json:"sha256,omitempty"`
	Recipient  string   `json:"recipient,omitempty"`
	Verified   bool     `json:"verified"`
	StoreBytes int64    `json:"store_bytes,omitempty"`
}

func (a *app) backupCreateCmd() *cobra.Command {
	var recipient, out, identity string
	c := leaf(&cobra.Command{
		Use:   "create",
		Short: "Write an encrypted backup of the store to a file (operator)",
		Long: `Write an encrypted backup of the store to a file, which must not exist. The file
has its name only once it is whole and on disk. With --identity it is opened again
first, which proves that it can be. --timeout is for the connection only: a large
store takes its time.`,
		Example: `  custodianctl backup create --recipient age1... --out store-2030-01-31.age`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if _, err := age.ParseX25519Recipient(recipient); err != nil {
			return invalid(fmt.Errorf("--recipient: it must be the public key of an age X25519 identity, age1…: %w", err))
		}
		var id *age.X25519Identity
		if identity != "" {
			var err error
			if id, err = readIdentity(identity); err != nil {
				return err
			}
			if id.Recipient().String() != recipient {
				return invalid(fmt.Errorf("--identity %s: it does not belong to --recipient, so it could not open the backup", identity))
			}
		}
		v := backupView{File: out, Recipient: recipient}
		if err := a.createBackup(ctx, &v, id); err != nil {
			return fmt.Errorf("back up to %s: %w", out, err)
		}
		if a.json {
			return a.printJSON(v)
		}
		fields := [][2]string{{"backup", out}, {"size", bytesText(v.Bytes)}, {"sha256", v.SHA256.String()}}
		if v.Verified {
			fields = append(fields, [2]string{"checked", fmt.Sprintf("it decrypts, and holds a whole store of %s", bytesText(v.StoreBytes))})
		} else {
			fields = append(fields, [2]string{"unchecked", "--identity, or custodianctl backup verify where the identity is, proves that it can be opened"})
		}
		return a.printFields(fields)
	})
	f := c.Flags()
	f.StringVar(&recipient, "recipient", "", "age public key, `age1...`")
	f.StringVar(&out, "out", "", "`FILE` to write")
	f.StringVar(&identity, "identity", "", "age identity `FILE` of the recipient, to open the backup again")
	return need(c, "recipient", "out")
}

// createBackup writes v.File and fills v in. The name appears last: who finds
// the file finds a whole backup. There is no deadline: a store may be large, and
// a connection that is dead ends by itself.
func (a *app) createBackup(ctx context.Context, v *backupView, id *age.X25519Identity) error {
	if _, err := os.Lstat(v.File); err == nil {
		return fs.ErrExist
	}
	cl, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer cl.Close()
	partial := v.File + ".partial"
	f, err := os.OpenFile(partial, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is in the way: another backup is running, or was killed; remove it in that case: %w", partial, fs.ErrExist)
	}
	if err != nil {
		return err
	}
	defer os.Remove(partial) // gone already when all went well
	defer f.Close()
	sum := sha256.New()
	if err := cl.Backup(ctx, &v1.BackupRequest{Recipient: v.Recipient}, io.MultiWriter(f, sum)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if v.Bytes, err = f.Seek(0, io.SeekCurrent); err != nil {
		return err
	}
	v.SHA256 = sum.Sum(nil)
	if id != nil {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if v.StoreBytes, err = openBackup(f, id); err != nil {
			return fmt.Errorf("the daemon's answer is not a whole backup, nothing is kept: %w", err)
		}
		v.Verified = true
	}
	return publish(partial, v.File)
}

// publish gives a file its name, if nobody else has it, and makes it durable.
func publish(partial, name string) error {
	err := unix.Renameat2(unix.AT_FDCWD, partial, unix.AT_FDCWD, name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// Some file systems cannot refuse to replace. A link can.
		if err = os.Link(partial, name); err == nil {
			err = os.Remove(partial)
		}
	}
	if err != nil {
		return fmt.Errorf("name it: %w", err)
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func (a *app) backupVerifyCmd() *cobra.Command {
	var identity string
	c := leaf(&cobra.Command{
		Use:               "verify FILE",
		Short:             "Open a backup and see that it is whole; exit code 7 if it is not",
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
	}, cobra.ExactArgs(1), func(_ context.Context, args []string) error {
		id, err := readIdentity(identity)
		if err != nil {
			return err
		}
		f, err := os.Open(args[0])
		if err != nil {
			return fmt.Errorf("verify backup: %w", err)
		}
		defer f.Close()
		v := backupView{File: args[0], Verified: true}
		info, err := f.Stat()
		if err != nil {
			return fmt.Errorf("verify backup: %w", err)
		}
		v.Bytes = info.Size()
		if v.StoreBytes, err = openBackup(f, id); err != nil {
			return fmt.Errorf("verify backup %s: %w", args[0], err)
		}
		if a.json {
			return a.printJSON(v)
		}
		return a.printf("%s decrypts, and holds a whole store of %s\n", args[0], bytesText(v.StoreBytes))
	})
	c.Flags().StringVar(&identity, "identity", "", "age identity `FILE` that it is encrypted to")
	return need(c, "identity")
}

// openBackup decrypts a backup to its end and returns how large the store in it
// is. age proves that nothing is changed or cut off, and the store's first pages
// say how long it must be.
func openBackup(r io.Reader, id *age.X25519Identity) (int64, error) {
	plaintext, err := age.Decrypt(r, id)
	if _, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
		return 0, invalid(errors.New("it is encrypted to somebody else, not to this identity"))
	}
	if err != nil {
		return 0, damaged(err)
	}
	head := make([]byte, 64<<10)
	n, err := io.ReadFull(plaintext, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return 0, damaged(err)
	}
	rest, err := io.Copy(io.Discard, plaintext)
	if err != nil {
		return 0, damaged(err)
	}
	want, err := storeSize(head[:n])
	if err != nil {
		return 0, damaged(err)
	}
	if got := int64(n) + rest; got != want {
		return 0, damaged(fmt.Errorf("the store in it has %d bytes, and says that it has %d", got, want))
	}
	return want, nil
}

// The meta page of a bbolt file, after the page's own header of 16 bytes, in the
// byte order of the machine: magic (4), version (4), page size (4), flags (4),
// root (16), free list (8), number of pages (8), transaction (8), checksum (8,
// FNV-1a of what is before it).
const (
	metaStart    = 16
	metaPageSize = metaStart + 8
	metaPages    = metaStart + 40
	metaSum      = metaStart + 56
	metaEnd      = metaSum + 8

	boltMagic   = 0xED0CDAED
	boltVersion = 2
)

// storeSize says how long the store is that begins like this. custodiand restore
// looks at every page; here it is enough to see that the copy has all of them.
func storeSize(head []byte) (int64, error) {
	if len(head) < metaEnd {
		return 0, fmt.Errorf("%s are no store", number(int64(len(head)), "byte", "bytes"))
	}
	order := binary.NativeEndian
	if order.Uint32(head[metaStart:]) != boltMagic || order.Uint32(head[metaStart+4:]) != boltVersion {
		return 0, errors.New("what is in it is no store")
	}
	sum := fnv.New64a()
	sum.Write(head[metaStart:metaSum]) // never fails
	if sum.Sum64() != order.Uint64(head[metaSum:]) {
		return 0, errors.New("the first page of the store in it is damaged")
	}
	return int64(order.Uint64(head[metaPages:])) * int64(order.Uint32(head[metaPageSize:])), nil
}

// readIdentity reads the one X25519 identity of an age identity file, which
// nobody else may read.
func readIdentity(path string) (*age.X25519Identity, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("age identity: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("age identity: %w", err)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, invalid(fmt.Errorf("age identity %s: mode %04o lets others read it, 0600 is needed", path, perm))
	}
	ids, err := age.ParseIdentities(io.LimitReader(f, 1<<20))
	if err != nil {
		// The error of the parser may quote the line, which may be the key.
		return nil, invalid(fmt.Errorf("age identity %s: not an age identity file", path))
	}
	if id, ok := ids[0].(*age.X25519Identity); ok && len(ids) == 1 {
		return id, nil
	}
	return nil, invalid(fmt.Errorf("age identity %s: it must hold one X25519 identity and nothing else", path))
}

func (a *app) backupKeygenCmd() *cobra.Command {
	var out string
	c := leaf(&cobra.Command{
		Use:   "keygen",
		Short: "Make an age identity for backups, and print its public key",
		Long: `Make an age X25519 identity for backups: a file that only its owner may read. Keep
it away from the daemon's machine, which needs only the public key: the recipient.`,
	}, cobra.NoArgs, func(context.Context, []string) error {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			return fmt.Errorf("make an age identity: %w", err)
		}
		recipient := id.Recipient().String()
		text := []byte("# created: " + stamp(a.now()) + "\n# public key: " + recipient + "\n" + id.String() + "\n")
		defer clear(text)
		if err := writeNew(out, text); err != nil {
			return fmt.Errorf("make an age identity: %w", err)
		}
		if a.json {
			return a.printJSON(struct {
				File      string `json:"file"`
				Recipient string `json:"recipient"`
			}{out, recipient})
		}
		return a.printf("%s\n", recipient)
	})
	c.Flags().StringVar(&out, "out", "", "`FILE` to write, which must not exist")
	return need(c, "out")
}

// writeNew writes a private file that must not exist yet, to the disk.
func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}
