"""HTTP services in threads of the test, which answer as they are told."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service:
    """What was asked, and what is to be answered: one function of the number of the request and the body."""

    def __init__(self, answer):
        self.answer = answer
        self.bodies = []
        self.headers = []
        self.url = ""


def says(status=200, body=b"", kind="application/json", **headers):
    """An answer."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return status, raw, {"Content-Type": kind, **headers}


class QuietHandler(BaseHTTPRequestHandler):
    """Prints nothing of what is asked."""

    def log_message(self, *args):
        pass


@contextmanager
def loopback(handler, waits=True):
    """A server of this machine for the length of a block; its address. It may leave requests behind that hang."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = waits
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def service(answer):
    """A service on the loopback; `answer(number, request)` returns what `says` makes."""
    state = Service(answer)

    class Handler(QuietHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.bodies.append(json.loads(body))
            state.headers.append(dict(self.headers))
            answered = state.answer(len(state.bodies) - 1, state.bodies[-1])
            if answered is None:  # hangs up
                return
            status, raw, headers = answered
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for start in range(0, len(raw), 64) if "X-Slow" in headers else [0]:
                    self.wfile.write(raw[start : start + 64] if "X-Slow" in headers else raw)
                    self.wfile.flush()
                    time.sleep(float(headers.get("X-Slow", 0)))
            except OSError:
                pass

    with loopback(Handler) as state.url:
        yield state
