#!/bin/sh
# Generates Go from every .proto below sdk/proto, and sdk/internal/wire's conversions and adapters. Run from
# anywhere; `make generate` calls it, and CI fails when it changes anything. protoc is Debian's
# (protobuf-compiler, libprotobuf-dev); the generators are pinned here.
set -eu
cd "$(dirname "$0")/../.."
tools=${TMPDIR:-/tmp}/mvirt-gen-$(id -u)
mkdir -p "$tools"
GOBIN=$tools go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$tools go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
PATH=$tools:$PATH
protos=$(cd sdk/proto && find mvirt -name '*.proto' | LC_ALL=C sort)
# The compiler's version would make the output differ between Debian releases: it is taken out of the comments.
protoc -I sdk/proto --go_out=. --go_opt=module=github.com/mvirt/mvirt \
	--go-grpc_out=. --go-grpc_opt=module=github.com/mvirt/mvirt $protos
find sdk/internal/pb core/apiv1 -name '*.pb.go' -exec sed -i -E 's|^(// -?[ \t]*protoc +)v[0-9.]+$|\1(any)|' {} +
go run ./sdk/internal/wiregen
