#!/bin/sh
# Print commands that ask a running server about an image:  sh examples/curl.sh [PORT] [IMAGE]
set -eu

port=${1:-8080}
here=$(cd "$(dirname "$0")" && pwd)
image=${2:-"$here/shapes/pictures/orange-star-and-blue-square.jpg"}
image=$(cd "$(dirname "$image")" && pwd)/$(basename "$image")
case $image in
*.png) type=image/png ;;
*) type=image/jpeg ;;
esac

cat <<HINT
When the server is ready, paste one of these into another terminal.

The endpoint's route, as a hosted endpoint calls it:

curl -s http://127.0.0.1:$port/invocations -H 'content-type: application/json' -d @- <<JSON
{"messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "data:$type;base64,\$(base64 < '$image' | tr -d '\n')"}},
  {"type": "text", "text": "What is in this image?"}]}], "max_tokens": 64}
JSON

The OpenAI route, streamed:

curl -sN http://127.0.0.1:$port/v1/chat/completions -H 'content-type: application/json' -d @- <<JSON
{"messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "data:$type;base64,\$(base64 < '$image' | tr -d '\n')"}},
  {"type": "text", "text": "What is in this image?"}]}], "max_tokens": 64, "stream": true}
JSON

HINT
