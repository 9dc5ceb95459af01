"""What does the server see in a photograph? Its classes, and the overlay as a picture.

cfcam serve demo &
python examples/serve/client.py http://127.0.0.1:8000 cat.jpg overlay.png
"""

import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

server, photograph, overlay = sys.argv[1:]

# The file itself is the body; what is wanted stands in the query.
request = urllib.request.Request(f"{server}/explain?overlay=true&map=none", data=Path(photograph).read_bytes())
request.add_header("Content-Type", "application/octet-stream")
try:
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = json.load(answer)
except urllib.error.HTTPError as refused:  # 413, 422, 503, ...: the reason in one line
    sys.exit(f"{refused.code}: {json.load(refused)['error']}")

for found in said["classes"]:
    print(f"{found['probability']:.3f} {found['name']}")
Path(overlay).write_bytes(base64.b64decode(said["overlay"]))
print(f"{overlay}: {said['explained']['name']}")
