"""`rollout resume`: go on with a run."""

import typer

from orchestrator.cli import options


def resume(
    ctx: typer.Context,
    run: options.Directory,
    concurrency: options.Concurrency = None,
    sandboxes: options.Sandboxes = None,
    base_url: options.BaseUrl = None,
    shards: options.Shards = None,
    ray_address: options.RayAddress = None,
    listen: options.Listen = None,
    json: options.Json = False,
    log_level: options.LogLevel = None,
    verbose: options.Verbose = False,
    no_install: options.NoInstall = False,
) -> None:
    """Go on with an unfinished run, with the episodes in flight too. A finished one prints its summary again.

    Everything is as the run was started; the options given here override it. The summary is of the whole run, but for
    its times, rates, CPU, memory and failures: these are of the time since the resume.

    Over other shards episodes in flight go on too, as long as their nodes are there; without any (--shards 0) they
    begin anew.
    """
    from orchestrator.cli.conduct import conduct, report
    from orchestrator.cli.config import stored
    from orchestrator.cli.output import say
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
    if config.get("shards") and shards == 0:
        say("without shards, the episodes that they had in flight begin anew")
    goes_on = stored(config, options.given(ctx) | {"out": run})
    raise typer.Exit(conduct(goes_on, resume=True, install=not no_install, json=json, verbose=verbose))
