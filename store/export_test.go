package store

// Recode decodes a record of a kind and encodes the result again: what the
// fuzz targets hold against each other.
var Recode = map[string]func(b []byte) ([]byte, error){
	"content key": func(b []byte) ([]byte, error) {
		k, err := decodeContentKey(b)
		return encodeContentKey(k), err
	},
	"control": func(b []byte) ([]byte, error) {
		c, err := decodeControl(recordControl, b)
		return encodeControl(recordControl, c), err
	},
	"head": func(b []byte) ([]byte, error) {
		c, err := decodeControl(recordHead, b)
		return encodeControl(recordHead, c), err
	},
	"journal": func(b []byte) ([]byte, error) {
		j, err := decodeJournal(b)
		return encodeJournal(j), err
	},
	"counters": func(b []byte) ([]byte, error) {
		c, err := decodeCounters(b)
		return encodeCounters(c), err
	},
}
