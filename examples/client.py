"""A client of `wanduet serve`, in plain HTTP: submit, wait, download. The `openai` package does the same."""

import time

import httpx

with httpx.Client(base_url="http://127.0.0.1:8000", timeout=60) as server:
    answer = server.post("/v1/videos", json={"prompt": "a red circle moving left on a beige background", "seed": 7})
    answer.raise_for_status()
    video = answer.json()
    while video["status"] in ("queued", "in_progress"):
        print(f"{video['status']} {video['progress']} %")
        time.sleep(1)
        video = server.get(f"/v1/videos/{video['id']}").json()
    if video["error"]:
        raise SystemExit(video["error"]["message"])
    with open("client.mp4", "wb") as file:
        file.write(server.get(f"/v1/videos/{video['id']}/content").content)
    print("client.mp4")
