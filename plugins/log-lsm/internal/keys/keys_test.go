package keys

import (
	"bytes"
	"testing"
)

func TestOrderAndParse(t *testing.T) {
	for _, pair := range [][2][]byte{
		{BlockKey(nil, 1, 1, 0xFFFF), BlockKey(nil, 1, 2, 0)},
		{BlockKey(nil, 1, 1<<32-1, 7), BlockKey(nil, 2, 0, 0)},
		{PostingKey(nil, 3, 31, 9), PostingKey(nil, 3, 32, 0)},
		{PostingKey(nil, 3, 5, 9), PostingKey(nil, 3, 5, 10)},
		{NumberKey(Name, 255), NumberKey(Name, 256)},
		{BytesKey(Object, []byte("a")), BytesKey(Object, []byte("a\x00"))},
	} {
		if bytes.Compare(pair[0], pair[1]) >= 0 {
			t.Errorf("%x is not before %x", pair[0], pair[1])
		}
	}
	if l, s, b, err := ParseBlock(BlockKey(nil, 4, 77, 12)); l != 4 || s != 77 || b != 12 || err != nil {
		t.Error(l, s, b, err)
	}
	if l, s, g, err := ParsePosting(PostingKey(nil, 4, 77, 12)); l != 4 || s != 77 || g != 12 || err != nil {
		t.Error(l, s, g, err)
	}
	if l, s, p, err := ParseFilter(FilterKey(4, 77, 12)); l != 4 || s != 77 || p != 12 || err != nil {
		t.Error(l, s, p, err)
	}
	bad := PostingKey(nil, 4, 77, 12)
	bad[13] ^= 0x80 // a segment of another epoch
	if _, _, _, err := ParsePosting(bad); err == nil {
		t.Error("a posting in the wrong epoch accepted")
	}
}

func TestEnd(t *testing.T) {
	for prefix, end := range map[string]string{"a": "b", "a\xff": "b", "\x01\xff\xff": "\x02"} {
		if got := End([]byte(prefix)); string(got) != end {
			t.Errorf("end of %q is %q", prefix, got)
		}
	}
	if End([]byte{0xff}) != nil {
		t.Error("there is an end behind everything")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(BlockKey(nil, 1, 2, 3))
	f.Add(PostingKey(nil, 1, 2, 3))
	f.Fuzz(func(t *testing.T, k []byte) {
		if l, s, b, err := ParseBlock(k); err == nil && !bytes.Equal(BlockKey(nil, l, s, b), k) {
			t.Error("a block key does not come back")
		}
		if l, s, g, err := ParsePosting(k); err == nil && !bytes.Equal(PostingKey(nil, l, s, g), k) {
			t.Error("a posting key does not come back")
		}
		_, _, _, _ = ParseFilter(k)
		_, _, _ = ParseSegment(k)
		_, _ = ParseNumber(k)
	})
}
