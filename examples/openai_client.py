"""The same with OpenAI's client: `pip install openai`. OpenAI has ended its own videos service, but the client still speaks
the protocol, as this server and others do. What the protocol does not have, such as a seed, goes into `extra_body`.

python examples/openai_client.py [ADDRESS [KEY]]
"""

import sys

from openai import OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{address}/v1", api_key=sys.argv[2] if len(sys.argv) > 2 else "none")
video = client.videos.create_and_poll(
    prompt="a red circle moving left on a beige background", extra_body={"seed": 7}, poll_interval_ms=1000
)
if video.error:
    raise SystemExit(video.error.message)
client.videos.download_content(video.id).write_to_file("client.mp4")
print("client.mp4")
