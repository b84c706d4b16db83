package chfake

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"reflect"
	"strings"

	"gopkg.in/yaml.v3"
)

// Spec is cloud-hypervisor's OpenAPI document, as far as requests need it.
type Spec struct {
	paths   map[string]any
	schemas map[string]any
}

// Load reads the document.
func Load(path string) (*Spec, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var doc struct {
		Paths      map[string]any `yaml:"paths"`
		Components struct {
			Schemas map[string]any `yaml:"schemas"`
		} `yaml:"components"`
	}
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	return &Spec{paths: doc.Paths, schemas: doc.Components.Schemas}, nil
}

// get walks through maps.
func get(v any, keys ...string) any {
	for _, k := range keys {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[k]
	}
	return v
}

// CheckRequest says what is wrong with a request: its path, its method, and each part of its body, decoded.
func (s *Spec) CheckRequest(method, what string, body any) error {
	op := get(s.paths["/"+what], strings.ToLower(method))
	if op == nil {
		return fmt.Errorf("the document has no %s /%s", method, what)
	}
	schema := get(op, "requestBody", "content", "application/json", "schema")
	switch {
	case schema == nil && body != nil:
		return fmt.Errorf("%s /%s takes no body", method, what)
	case schema == nil:
		return nil
	case body == nil:
		return fmt.Errorf("%s /%s needs a body", method, what)
	}
	return s.check("body", schema, body)
}

// CheckConfig says what is wrong with a VM's configuration that the server reads from a file. Descriptors in it
// are no part of the document.
func (s *Spec) CheckConfig(config any) error {
	b, err := json.Marshal(config)
	if err != nil {
		return err
	}
	var c map[string]any
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	nets, _ := c["net"].([]any)
	for _, n := range nets {
		if m, ok := n.(map[string]any); ok {
			delete(m, "fds")
		}
	}
	return s.check("config", s.schemas["VmConfig"], c)
}

func (s *Spec) check(at string, schema, v any) error {
	if ref, ok := get(schema, "$ref").(string); ok {
		name := ref[strings.LastIndexByte(ref, '/')+1:]
		target, ok := s.schemas[name]
		if !ok {
			return fmt.Errorf("%s: the document lacks %s", at, name)
		}
		return s.check(at, target, v)
	}
	if enum, ok := get(schema, "enum").([]any); ok {
		for _, e := range enum {
			if e == v {
				return nil
			}
		}
		return fmt.Errorf("%s is %v, not one of %v", at, v, enum)
	}
	ok := false
	switch get(schema, "type") {
	case "object":
		return s.checkObject(at, schema, v)
	case "array":
		list, isList := v.([]any)
		if !isList {
			break
		}
		for i, e := range list {
			if err := s.check(fmt.Sprintf("%s[%d]", at, i), get(schema, "items"), e); err != nil {
				return err
			}
		}
		return nil
	case "string":
		_, ok = v.(string)
	case "boolean":
		_, ok = v.(bool)
	case "integer":
		n, isNumber := v.(float64)
		ok = isNumber && n == math.Trunc(n)
		if least, has := get(schema, "minimum").(int); has && n < float64(least) {
			return fmt.Errorf("%s is %v, below %d", at, n, least)
		}
	}
	if !ok {
		return fmt.Errorf("%s is %T, not %v", at, v, get(schema, "type"))
	}
	return nil
}

func (s *Spec) checkObject(at string, schema, v any) error {
	m, ok := v.(map[string]any)
	if !ok {
		return fmt.Errorf("%s is %T, not an object", at, v)
	}
	required, _ := get(schema, "required").([]any)
	for _, r := range required {
		if _, there := m[fmt.Sprint(r)]; !there {
			return fmt.Errorf("%s lacks %v", at, r)
		}
	}
	for k, e := range m {
		if k == "net_fds" && schemaIs(s.schemas["RestoreConfig"], schema) {
			continue // the server takes it, the document lacks it
		}
		prop := get(schema, "properties", k)
		if prop == nil {
			return fmt.Errorf("%s has %q, which the document does not know", at, k)
		}
		if err := s.check(at+"."+k, prop, e); err != nil {
			return err
		}
	}
	return nil
}

func schemaIs(a, b any) bool {
	x, ok := a.(map[string]any)
	y, ok2 := b.(map[string]any)
	return ok && ok2 && reflect.ValueOf(x).Pointer() == reflect.ValueOf(y).Pointer()
}
