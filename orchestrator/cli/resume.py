"""`rollout resume`: go on with a run."""

import typer

from orchestrator.cli import options


def resume(
    ctx: typer.Context,
    run: options.Directory,
    concurrency: options.Concurrency = None,
    sandboxes: options.Sandboxes = None,
    base_url: options.BaseUrl = None,
    json: options.Json = False,
    log_level: options.LogLevel = None,
    verbose: options.Verbose = False,
    no_install: options.NoInstall = False,
) -> None:
    """Go on with an unfinished run, with the episodes in flight too. A finished one prints its summary again.

    Everything is as the run was started; the options given here override it. The summary is of the whole run, but for
    its times, rates, CPU, memory and failures: these are of the time since the resume.
    """
    from orchestrator.cli.conduct import conduct, report
    from orchestrator.cli.config import stored
    from orchestrator.errors import UsageError
    from orchestrator.run import Run

    with Run.open(run) as opened:
        config, summary = opened.meta.config, opened.summary
    if summary is not None:
        report(summary | {"out": str(run)}, run, json=json)
        return
    if not config:
        raise UsageError(
            f"the run in {run} was started from Python: go on with it there, Orchestrator(..., resume=True)"
        )
    goes_on = stored(config, options.given(ctx) | {"out": run})
    raise typer.Exit(conduct(goes_on, resume=True, install=not no_install, json=json, verbose=verbose))
