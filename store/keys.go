package store

import (
	"encoding/binary"

	"github.com/keycustody/custodian/custodian"
)

// A bucketID names a bucket of the file.
type bucketID uint8

// The buckets. Only meta, control, content and cursor hold what cannot be
// made again from the others.
const (
	bucketMeta        bucketID = iota // marker, schema, counters, head and journal
	bucketControl                     // kind and name → control record
	bucketContent                     // KID → content key record
	bucketNatural                     // natural key → KID
	bucketCategory                    // content ID → category
	bucketFingerprint                 // helper version and MAC → KID
	bucketByKEK                       // KEK and KID → nothing
	bucketCursor                      // job → position
	bucketCount
)

var bucketNames = [bucketCount][]byte{
	bucketMeta:        []byte("meta"),
	bucketControl:     []byte("control"),
	bucketContent:     []byte("content"),
	bucketNatural:     []byte("natural"),
	bucketCategory:    []byte("content_category"),
	bucketFingerprint: []byte("fingerprint"),
	bucketByKEK:       []byte("bykek"),
	bucketCursor:      []byte("cursor"),
}

// The keys in bucketMeta.
var (
	metaMarker   = []byte("marker")
	metaSchema   = []byte("schema")
	metaCounters = []byte("counters")
	metaHead     = []byte("head")
	metaJournal  = []byte("journal")
)

// marker tells our files from every other bbolt file.
var marker = []byte("custodian key store")

// controlKey is kind and name: control records lie in the order of both.
func controlKey(kind custodian.ControlKind, name string) []byte {
	return append([]byte{byte(kind)}, name...)
}

// naturalPrefix is the part of a natural key that all its generations share.
// Keys made with it sort as their fields do: category, content ID, track
// type, scheme, no period before any period, generation.
func naturalPrefix(n custodian.NaturalKey) []byte {
	k := itemPrefix(n.Category, n.ContentID)
	k = appendText(k, string(n.TrackType))
	k = appendText(k, string(n.Scheme))
	if !n.HasPeriod {
		return append(k, 0)
	}
	return binary.BigEndian.AppendUint32(append(k, 1), n.Period)
}

func naturalKey(n custodian.NaturalKey) []byte {
	return binary.BigEndian.AppendUint32(naturalPrefix(n), n.Generation)
}

// itemPrefix begins every natural key of a content item, or of a category
// where id is empty.
func itemPrefix(c custodian.CategoryName, id custodian.ContentID) []byte {
	k := make([]byte, 0, len(c)+len(id)+32)
	k = appendText(k, string(c))
	if len(id) == 0 {
		return k
	}
	// A content ID may hold any byte. Zero is written as 00 FF and the end as
	// 00 01, which keeps the order and lets no ID be the prefix of another.
	for _, b := range id {
		k = append(k, b)
		if b == 0 {
			k = append(k, 0xff)
		}
	}
	return append(k, 0, 1)
}

// appendText appends a text without zero bytes, and a zero that ends it.
func appendText(k []byte, s string) []byte { return append(append(k, s...), 0) }

func fingerprintKey(f custodian.Fingerprint) []byte {
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(f.MAC)), f.Version), f.MAC[:]...)
}

func kekPrefix(id custodian.KEKID) []byte {
	k := make([]byte, 0, len(id.Category)+1+4+custodian.KIDSize)
	return binary.BigEndian.AppendUint32(appendText(k, string(id.Category)), id.Version)
}

func byKEKKey(id custodian.KEKID, kid custodian.KID) []byte { return append(kekPrefix(id), kid[:]...) }
