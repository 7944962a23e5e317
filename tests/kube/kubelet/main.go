// A kubelet's exec and nothing else: it runs programs where it runs itself. kwok has an exec too, which falls over
// when a terminal is asked for without an input, as the conformance suite does.
package main

import (
	"context"
	"crypto/tls"
	"flag"
	"io"
	"log"
	"net/http"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
	protocol "k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/client-go/tools/remotecommand"
	streaming "k8s.io/kubelet/pkg/cri/streaming/remotecommand"
	"k8s.io/utils/exec"
)

type here struct{}

func (here) ExecInContainer(ctx context.Context, _ string, _ types.UID, _ string, words []string, in io.Reader,
	out, err io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize, _ time.Duration) error {
	command := exec.New().CommandContext(ctx, words[0], words[1:]...)
	if in != nil {
		command.SetStdin(in)
	}
	if err == nil {
		err = out
	}
	command.SetStdout(out)
	command.SetStderr(err)
	return command.Run()
}

func main() {
	address := flag.String("address", ":10250", "where to listen")
	certificate := flag.String("tls-cert-file", "", "the server's certificate")
	key := flag.String("tls-private-key-file", "", "its key")
	flag.Parse()
	// /exec/NAMESPACE/POD/CONTAINER
	http.HandleFunc("/exec/", func(w http.ResponseWriter, r *http.Request) {
		path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
		words := r.URL.Query()["command"]
		options, err := streaming.NewOptions(r)
		if err != nil || len(path) < 4 || len(words) == 0 {
			http.Error(w, "which command, in which container?", http.StatusBadRequest)
			return
		}
		streaming.ServeExec(w, r, here{}, path[2], "", path[3], words, options, time.Hour, 30*time.Second,
			protocol.SupportedStreamingProtocols)
	})
	// Streams take over the connection, which HTTP/2 does not let them.
	server := http.Server{Addr: *address, TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}}
	log.Fatal(server.ListenAndServeTLS(*certificate, *key))
}
