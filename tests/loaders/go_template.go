// What Go's text/template, in which Ollama's templates are written, makes of a template and messages.
//
//	go run go_template.go < {"template": "...", "messages": [{"Role": "user", "Content": "..."}]} > text
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type question struct {
	Template string
	Messages []struct{ Role, Content string }
}

func main() {
	var asked question
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	if err := parsed.Execute(os.Stdout, map[string]any{"Messages": asked.Messages, "Response": ""}); err != nil {
		panic(err)
	}
}
