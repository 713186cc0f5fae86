// Package audit keeps the append-only log of everything that custody decided.
//
// An entry is one event. Append returns when the entries that it was given are
// on disk, so that a caller who waits for it has written down what it did
// before it hands anything over. The entries are the leaves of an RFC 6962
// Merkle tree; each batch on disk carries the root of the tree after it, so
// that an edit, a drop, a repeat or a swap in the middle does not verify. What
// cannot be seen from the log alone is that its end is missing: whoever needs
// to know compares Size and Root with what was kept elsewhere.
//
// The package decides how entries are encoded, framed, hashed and made
// durable, what happens when there is no room, and which denials are counted
// instead of written. It does not decide what is worth an entry or who may
// read it, and it knows nothing of keys: a Signer signs.
//
// # The files
//
// A log is a directory with segments: audit.log is segment 0, audit-00000001.log
// segment 1 and so on. The tree crosses them. The last one is written, the
// others are sealed. All integers are big-endian.
//
//	file header  magic "custaud\n" (8) · version 1 (4) · log ID (16) · zero (32) · CRC (4)
//	batch        header · payload · zeros to a multiple of 8 · trailer (8)
//	  header     magic "batch/1\n" (8) · payload length (4) · count (4) ·
//	             index of the first entry (8) · root after the batch (32) ·
//	             CRC of payload and padding (4) · CRC of log ID and header (4)
//	  payload    entries, each with its length as uvarint before it
//	  trailer    "\nbatch.\n"
//	signed batch as a batch, with the magic "batch/2\n" and another payload
//	  payload    entries, as above · checkpoint · its length (2)
//	seal         magic "batch/s\n" (8) · segment (4) · zero (4) · entries so far (8) ·
//	             root (32) · zero (4) · CRC of log ID and seal (4) · trailer (8)
//	tail         zeros, room that is allocated ahead; nothing behind a seal
//
// A segment from number 1 on begins with what is before it, so that it can be
// checked without: the roots of the largest complete subtrees from left to
// right, and the last checkpoint, if there is one, which signs them.
//
//	file header  magic (8) · version 2 (4) · log ID (16) · segment (4) ·
//	             index of its first entry (8) · length of the start (4) ·
//	             CRC of the start (4) · zero (12) · CRC (4)
//	start        roots (32 each) · checkpoint · zeros to a multiple of 8
//
// A new segment is on disk, complete and empty, before the old one is sealed
// and cut to its length; only then has it batches. A sealed segment that no
// segment follows, or one that follows and is missing, was taken away.
//
// A segment that is pruned is replaced, under its name, by what is left of it:
// the leaf hashes of its entries, or whole entries where they are kept. So the
// tree, and every proof, can still be computed.
//
//	file header  as above with version 3 · entries (8) in place of zero (12), and zero (4)
//	start        roots · size, batches, unsigned entries (8 each) · times of the first
//	             entry, the last one, the pruning (12 each) · root after it (32) ·
//	             checkpoint before it, last one in it, each behind its length (2)
//	entry        0 (1) · leaf hash (32), or its length as uvarint · the entry
//
// The CRCs are CRC-32C (RFC 3720); they find accidents, the root finds edits.
//
// Only one batch is in flight at a time, and it is acknowledged after
// fdatasync. So whatever lies beyond the last whole batch was never
// acknowledged, and at most one batch can be torn. A torn batch has parts that
// never arrived and read as zeros: its end, or whole disk sectors of 512
// bytes. No whole batch looks like that: headers and trailers begin and end in
// bytes that are not zero, no string of an entry contains a zero byte, and no
// other field is as long as a sector. A last batch that is wrong in another
// way was changed after it was written, which is damage.
//
// The checkpoint is the root after the batch, signed: a note as package
// checkpoint describes it, whose origin names the log ID. A log begins with
// batches that are not signed, where there was no key yet; after the first
// signed one all are. Signing comes before writing, so a root can have been
// signed whose batch never was on disk; such a checkpoint was in memory only.
//
// Later formats add kinds of frames, with magics of their own; the versions of
// the file header and the batches behind them stay as they are.
package audit
