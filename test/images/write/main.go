// Command write compiles a main package of this module for several architectures
// and writes it as one image into an OCI archive:
//
//	go run ./test/images/write -o provider.tar -name example.org/provider:v1 ./cmd/provider
//
// Tags and other settings of the compiler come from GOFLAGS.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"github.com/skerry-io/skerry/test/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "write:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("write", flag.ContinueOnError)
	output := flags.String("o", "", "archive to write")
	name := flags.String("name", "", "full reference of the image")
	archs := flags.String("arch", "amd64,arm64", "architectures, separated by commas")
	user := flags.String("user", "65532:65532", "user and group that containers run as")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 || *output == "" || *name == "" {
		return errors.New("want -o FILE -name REFERENCE PACKAGE")
	}
	image, err := images.Program(ctx, *name, flags.Arg(0), images.Config{User: *user}, strings.Split(*archs, ",")...)
	if err != nil {
		return err
	}
	return images.Write(*output, image)
}
