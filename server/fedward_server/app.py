"""The aggregator's side of Flower."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedward.errors import FedwardError
from fedward_server.round_loop import Job, StudyRun


def server_app(*jobs: Job) -> ServerApp:
    """The server application that runs these jobs one after the other.

    What a job reached stands in the job itself, also when the run ends early.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for job in jobs:
            if job.stop.is_set():
                return
            try:
                StudyRun(job, grid).run()
            except FedwardError as error:
                # Flower would log a traceback and end its runtime; who started the job asks.
                job.error = error
                return

    return app


app = server_app()
