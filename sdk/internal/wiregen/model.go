package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
)

// model is what the generator knows of one contract package.
type model struct {
	pkg     string // "storage"
	dir     string
	doc     string
	structs []*structType
	enums   []*enumType
	ifaces  []*iface
}

type structType struct {
	name   string
	doc    string
	fields []field
}

type field struct {
	name string // Go
	typ  typ
	doc  string
}

// typ is a field's or parameter's type: at most one level of slice or map around a base.
type typ struct {
	slice bool
	mapOf string // value type of map[string]X
	base  string // "string", "time.Time", "Volume", "service.Owner", "*os.File", …
}

type enumType struct {
	name   string
	doc    string
	consts []enumConst
}

type enumConst struct {
	name  string
	value string
	doc   string
}

type iface struct {
	name    string
	doc     string
	methods []method
}

// method is a method of a contract; stream tells that the generator leaves it to hand-written code.
type method struct {
	name     string
	doc      string
	req      *typ // nil: none
	resp     *typ // nil: error only
	stream   bool
	optional string // interface it belongs to, when that is optional
}

// load reads the contract package in dir.
func load(dir string) (*model, error) {
	fset := token.NewFileSet()
	names, err := filepath.Glob(filepath.Join(dir, "*.go")) // in order
	if err != nil {
		return nil, err
	}
	m := &model{dir: dir}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		m.pkg = file.Name.Name
		if d := file.Doc.Text(); d != "" {
			m.doc = d
		}
		for _, decl := range file.Decls {
			if gd, ok := decl.(*ast.GenDecl); ok {
				if err := m.decl(gd); err != nil {
					return nil, fmt.Errorf("%s: %w", fset.Position(gd.Pos()), err)
				}
			}
		}
	}
	return m, nil
}

func (m *model) decl(gd *ast.GenDecl) error {
	switch gd.Tok {
	case token.TYPE:
		for _, spec := range gd.Specs {
			ts := spec.(*ast.TypeSpec)
			doc := gd.Doc.Text()
			if ts.Assign != 0 || !ts.Name.IsExported() {
				continue
			}
			switch t := ts.Type.(type) {
			case *ast.StructType:
				if err := m.structDecl(ts.Name.Name, doc, t); err != nil {
					return err
				}
			case *ast.InterfaceType:
				if err := m.ifaceDecl(ts.Name.Name, doc, t); err != nil {
					return err
				}
			case *ast.Ident:
				if t.Name == "uint32" {
					m.enums = append(m.enums, &enumType{name: ts.Name.Name, doc: doc})
				}
			}
		}
	case token.CONST:
		for _, spec := range gd.Specs {
			vs := spec.(*ast.ValueSpec)
			id, ok := vs.Type.(*ast.Ident)
			if !ok || len(vs.Values) != 1 {
				continue
			}
			for _, e := range m.enums {
				if lit, ok := vs.Values[0].(*ast.BasicLit); ok && e.name == id.Name {
					e.consts = append(e.consts, enumConst{vs.Names[0].Name, lit.Value, strings.TrimSpace(vs.Comment.Text())})
				}
			}
		}
	}
	return nil
}

func (m *model) structDecl(name, doc string, t *ast.StructType) error {
	s := &structType{name: name, doc: doc}
	for _, f := range t.Fields.List {
		ty, err := parseType(f.Type)
		if err != nil {
			return nil // a struct of channels and functions is not a message
		}
		for _, n := range f.Names {
			s.fields = append(s.fields, field{n.Name, ty, strings.TrimSpace(f.Doc.Text() + f.Comment.Text())})
		}
	}
	m.structs = append(m.structs, s)
	return nil
}

func (m *model) ifaceDecl(name, doc string, t *ast.InterfaceType) error {
	i := &iface{name: name, doc: doc}
	for _, f := range t.Methods.List {
		ft, ok := f.Type.(*ast.FuncType)
		if !ok || len(f.Names) == 0 {
			continue
		}
		me := method{name: f.Names[0].Name, doc: f.Doc.Text()}
		if name != "Service" {
			me.optional = name
		}
		var params, results []typ
		for _, p := range ft.Params.List {
			ty, err := parseType(p.Type)
			if err != nil {
				me.stream = true
				continue
			}
			params = append(params, ty)
		}
		if ft.Results != nil {
			for _, r := range ft.Results.List {
				ty, err := parseType(r.Type)
				if err != nil {
					me.stream = true
					continue
				}
				results = append(results, ty)
			}
		}
		if len(params) == 0 || params[0].base != "context.Context" {
			continue // a marker
		}
		if len(params) > 2 {
			me.stream = true
		}
		if len(params) > 1 {
			me.req = &params[1]
		}
		if len(results) > 1 {
			me.resp = &results[0]
		}
		i.methods = append(i.methods, me)
	}
	m.ifaces = append(m.ifaces, i)
	return nil
}

func parseType(e ast.Expr) (typ, error) {
	switch t := e.(type) {
	case *ast.Ident:
		return typ{base: t.Name}, nil
	case *ast.SelectorExpr:
		switch s := t.X.(*ast.Ident).Name + "." + t.Sel.Name; s {
		case "io.Writer", "io.Reader":
			return typ{}, fmt.Errorf("stream")
		default:
			return typ{base: s}, nil
		}
	case *ast.StarExpr:
		in, err := parseType(t.X)
		if err != nil || in.base != "os.File" {
			return typ{}, fmt.Errorf("pointer")
		}
		return typ{base: "*os.File"}, nil
	case *ast.ArrayType:
		in, err := parseType(t.Elt)
		in.slice = true
		return in, err
	case *ast.MapType:
		v, err := parseType(t.Value)
		return typ{mapOf: v.base}, err
	}
	return typ{}, fmt.Errorf("unsupported type %T", e)
}

func (m *model) enum(name string) *enumType {
	for _, e := range m.enums {
		if e.name == name {
			return e
		}
	}
	return nil
}

func (m *model) structNamed(name string) *structType {
	for _, s := range m.structs {
		if s.name == name {
			return s
		}
	}
	return nil
}
