"""A client of `wanduet serve` in plain HTTP, with nothing but Python: submit, wait, download.

python examples/client.py [ADDRESS [KEY]]
"""

import json
import shutil
import sys
import time
import urllib.error
import urllib.request

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
KEY = sys.argv[2] if len(sys.argv) > 2 else "none"


def call(path, body=None):
    """Open a path of the server; with a body, POST it as JSON. Exits with the server's own message if it refuses."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    try:
        return urllib.request.urlopen(urllib.request.Request(ADDRESS + path, data, headers), timeout=60)
    except urllib.error.HTTPError as error:
        raise SystemExit(json.load(error)["error"]["message"]) from None
    except urllib.error.URLError as error:
        raise SystemExit(f"No server answers at {ADDRESS}: {error.reason}") from None


video = json.load(call("/v1/videos", {"prompt": "a red circle moving left on a beige background", "seed": 7}))
while video["status"] in ("queued", "in_progress"):
    print(f"{video['status']} {video['progress']} %")
    time.sleep(1)
    video = json.load(call(f"/v1/videos/{video['id']}"))
if video["error"]:
    raise SystemExit(video["error"]["message"])
with call(f"/v1/videos/{video['id']}/content") as content, open("client.mp4", "wb") as file:
    shutil.copyfileobj(content, file)
print("client.mp4")
