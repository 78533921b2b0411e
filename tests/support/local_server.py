"""Servers of socketserver's kind that run in a thread, and what handlers of HTTP have in common."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler


class Handler(BaseHTTPRequestHandler):
    """Says nothing of its requests on stderr."""

    def log_message(self, *_):
        pass

    def sent(self):
        """The request's body."""
        return self.rfile.read(int(self.headers["Content-Length"]))

    def reply(self, status, text, headers=()):
        """Answer with a whole text, and headers beside its length."""
        content = text.encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(server, at_end=lambda: None):
    """Run a server for as long as the context lasts; `at_end` lets go what its handlers hold, before it is closed."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        at_end()
        server.shutdown()
        thread.join()
        server.server_close()
