package packager

import (
	"bytes"
	"crypto/aes"
	"reflect"
	"testing"
	"unsafe"
)

func TestForget(t *testing.T) {
	key := []byte("sixteen key byte")
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	v := reflect.ValueOf(block)
	state := unsafe.Slice((*byte)(v.UnsafePointer()), v.Type().Elem().Size())
	if bytes.Count(state, []byte{0}) == len(state) {
		t.Fatal("the cipher does not keep its key where forget looks")
	}
	forget(block)
	if bytes.Count(state, []byte{0}) != len(state) {
		t.Error("the cipher still knows its key")
	}
	for i := range v.Type().Elem().NumField() {
		if kind := v.Type().Elem().Field(i).Type.Kind(); kind == reflect.Pointer || kind == reflect.Slice || kind == reflect.Interface {
			t.Errorf("field %d of the cipher is a %s: the key may lie behind it", i, kind)
		}
	}
}
