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
// # The file
//
// A log is a directory with one file, audit.log. All integers are big-endian.
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
//	tail         zeros, room that is allocated ahead
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
// Later formats add kinds of frames, with magics of their own; version 1 of
// the file header and the batches in it stay as they are.
package audit
