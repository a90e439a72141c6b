"""An S3 server of moto, as a program: `python s3.py PORT FILE`. Writes are refused while FILE exists."""

import sys
from pathlib import Path

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

REFUSAL = b"<Error><Code>ServiceUnavailable</Code><Message>no writes now</Message></Error>"


def main(port, refuse):
    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response):
        if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") and Path(refuse).exists():
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [REFUSAL]
        return moto(environ, start_response)

    run_simple("127.0.0.1", int(port), application, threaded=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
