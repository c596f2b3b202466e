// Reads PromQL expressions, one a line, and says which of them Prometheus' own parser refuses.
package main

import (
	"bufio"
	"fmt"
	"os"

	"github.com/prometheus/prometheus/promql/parser"
)

func main() {
	code := 0
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if _, err := parser.ParseExpr(lines.Text()); err != nil {
			fmt.Printf("%s: %v\n", lines.Text(), err)
			code = 1
		}
	}
	os.Exit(code)
}
