package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keycustody/custodian/internal/anchor"
)

func (a *app) auditWitnessCmd() *cobra.Command {
	var dir, listen, name, certFile, keyFile string
	c := leaf(&cobra.Command{
		Use:   "witness",
		Short: "Be a witness of audit logs, until it is interrupted",
		Long: `Be a witness (https://c2sp.org/tlog-witness) of the audit logs of others: keep the
newest checkpoint of each, take a newer one only with a proof that it continues
that, and sign what was taken. Run it on a machine that nobody who runs the log has
power over. DIR has the public key of each log, as custodianctl audit key prints
it, under the name ID.pem, where ID is what the log's origin ends in; its newest
checkpoint is kept beside it, as ID.checkpoint. The witness's own key is made when
DIR has none. What is printed first is for the key of the anchor in the daemon's
configuration.`,
		Example: `  custodianctl audit witness --dir /var/lib/witness --name witness.studio.example --listen 0.0.0.0:7490 --cert w.pem --key w.key`,
	}, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if (certFile == "") != (keyFile == "") {
			return invalid(errors.New("--cert and --key go together"))
		}
		host, _, err := net.SplitHostPort(listen)
		if err != nil {
			return invalid(fmt.Errorf("--listen: %w", err))
		}
		if ip := net.ParseIP(host); certFile == "" && (ip == nil || !ip.IsLoopback()) {
			return invalid(fmt.Errorf("--listen %s: without --cert and --key only a loopback address", plain(listen)))
		}
		key, err := witnessKey(filepath.Join(dir, "witness.key"))
		if err != nil {
			return invalid(err)
		}
		w := &anchor.Server{Dir: dir, Name: name, Key: key}
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return fmt.Errorf("witness: %w", err)
		}
		if certFile != "" {
			pair, err := tls.LoadX509KeyPair(certFile, keyFile)
			if err != nil {
				return invalid(err)
			}
			l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12})
		}
		if err := a.printf("%s\nlistening on %s\n", w.VerifierKey(), l.Addr()); err != nil {
			return err
		}
		s := &http.Server{Handler: w, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute}
		stop := context.AfterFunc(ctx, func() { s.Close() })
		defer stop()
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("witness: %w", err)
		}
		return nil
	})
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "`DIR`ectory of the logs' keys and checkpoints")
	f.StringVar(&listen, "listen", "127.0.0.1:7490", "`ADDRESS` to listen on")
	f.StringVar(&name, "name", "", "`NAME` of the witness in its cosignatures: a URL without its scheme is usual")
	f.StringVar(&certFile, "cert", "", "`FILE` with the certificate of the listener, PEM")
	f.StringVar(&keyFile, "key", "", "`FILE` with its private key, PEM")
	return need(c, "dir", "name")
}

// witnessKey reads the key of a witness, and makes one where there is none.
func witnessKey(path string) (ed25519.PrivateKey, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeWitnessKey(path)
	}
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s: no key in PEM", path)
	}
	any, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	key, ok := any.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: not an Ed25519 key", path)
	}
	return key, nil
}

func makeWitnessKey(path string) (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err == nil {
		err = f.Sync()
	}
	return key, errors.Join(err, f.Close())
}
