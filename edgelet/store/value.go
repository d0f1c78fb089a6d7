package store

import (
	"encoding/binary"
	"hash/crc32"
)

// Kinds of values, the first byte of each.
const (
	kindJSON   = 1
	kindSealed = 2
)

const valueHeader = 5 // kind 1, CRC 4

// frame returns content with the header that every value has.
func frame(bucket, key string, kind byte, content []byte) []byte {
	b := make([]byte, valueHeader, valueHeader+len(content))
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], checksum(bucket, key, kind, content))
	return append(b, content...)
}

// intact reports whether b is a value that frame made for this bucket and key.
func intact(bucket, key string, b []byte) bool {
	return len(b) >= valueHeader && (b[0] == kindJSON || b[0] == kindSealed) &&
		binary.BigEndian.Uint32(b[1:]) == checksum(bucket, key, b[0], b[valueHeader:])
}

// unframe returns kind and content of an intact value, as a part of b.
func unframe(bucket, key string, b []byte) (kind byte, content []byte, err error) {
	if !intact(bucket, key, b) {
		return 0, nil, corruptf("value of %d bytes has a wrong checksum", len(b))
	}
	return b[0], b[valueHeader:], nil
}

func checksum(bucket, key string, kind byte, content []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli) // a constant of the library
	sum := crc32.Update(0, table, []byte(bucket))
	sum = crc32.Update(sum, table, []byte{0})
	sum = crc32.Update(sum, table, []byte(key))
	sum = crc32.Update(sum, table, []byte{0, kind})
	return crc32.Update(sum, table, content)
}
