package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/keycustody/custodian/client"
)

func (a *app) pkiRecipientKeyCmd() *cobra.Command {
	var out, kem string
	kems := client.RecipientKEMs()
	c := leaf(&cobra.Command{
		Use:   "recipient-key",
		Short: "Make a key that the daemon seals a caller's content keys to",
		Long: `Make a private key that opens the content keys which the daemon seals to its public
half, and print the public half: sealing.recipients[].keys in the daemon's config.
A file that is there is kept, and its public half printed.`,
		Example: `  custodianctl pki recipient-key --out recipient.key`,
	}, cobra.NoArgs, func(context.Context, []string) error {
		if !slices.Contains(kems, kem) {
			return invalid(fmt.Errorf("--kem %s: must be one of %v", plain(kem), kems))
		}
		key, err := makeRecipientKey(out, kem)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(struct {
				File      string `json:"file"`
				ID        string `json:"id"`
				PublicKey string `json:"public_key"`
			}{out, key.ID(), key.Public()})
		}
		return a.printf("%s\n", key.Public())
	})
	c.Flags().StringVar(&out, "out", "", "`FILE` for the private key")
	c.Flags().StringVar(&kem, "kem", kems[0], "`KEM`: "+kems[0]+" (withstands quantum computers) or "+kems[1])
	completeWords(c, "kem", kems...)
	return need(c, "out")
}

// makeRecipientKey makes the key of a file that is not there, or reads the file.
func makeRecipientKey(path, kem string) (client.RecipientKey, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return client.ReadRecipientKey(path)
	}
	if err != nil {
		return client.RecipientKey{}, fmt.Errorf("recipient key: %w", err)
	}
	key, err := client.GenerateRecipientKey(kem)
	var text []byte
	if err == nil {
		text, err = key.Text()
	}
	if err == nil {
		_, err = f.Write(text)
	}
	if err == nil {
		err = f.Sync()
	}
	clear(text)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
		return client.RecipientKey{}, fmt.Errorf("recipient key %s: %w", path, err)
	}
	return key, nil
}

func recipientKeys(files []string) ([]client.RecipientKey, error) {
	var keys []client.RecipientKey
	for _, file := range files {
		k, err := client.ReadRecipientKey(file)
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}
