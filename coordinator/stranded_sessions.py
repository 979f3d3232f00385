"""Sessions on the target that began in TimescaleDB's restoring mode, which they keep when it is over for the database.

What such a session inserts into a hypertable lies in the hypertable's own file, where no other session sees it, and compressed rows are not there for it.
"""

from __future__ import annotations

from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.timescale import read_layout
from live_migration.coordinator import steps
from live_migration.coordinator.run import APPLICATION, Run
from live_migration.coordinator.timescale_catalog import POST_RESTORE, PRE_RESTORE

# Whoever may not look at a session of another role sees no start of it.
_SESSIONS = """
    select format('pid %s (%s, user %s)', a.pid, coalesce(nullif(a.application_name, ''), 'no application name'), a.usename) as who,
           a.backend_start is not null as is_seen
    from pg_stat_activity a join _live_migration.steps after on after.name = $2 and after.is_done
    left join _live_migration.steps before on before.name = $1
    where a.datname = current_database() and a.pid <> pg_backend_pid() and coalesce(a.backend_type, 'client backend') = 'client backend'
      and a.usename is not null and a.application_name not like $3
      and coalesce(a.backend_start <= after.at, true) and coalesce(a.backend_start >= before.at, true)
    order by a.pid
"""

_HAS_ROWS = "select exists (select from only {})"


async def find_stranded(run: Run) -> list[str]:
    """Give what speaks against the cutover: sessions of others that began in restoring mode. Those whose start is hidden are named in a warning."""
    with asking("target", "looking at sessions"):
        rows = await run.target.fetch(_SESSIONS, PRE_RESTORE, POST_RESTORE, f"{APPLICATION}%")
    if hidden := [row["who"] for row in rows if not row["is_seen"]]:
        run.reporter.warn_on_change(
            "hidden sessions",
            f"our role may not see when these sessions on the target began: {name_list(hidden)}. Those that began before phase replay would write rows into "
            "hypertables that nobody else sees: close them, or GRANT pg_read_all_stats",
        )
    return [
        f"{row['who']} is connected to the target since TimescaleDB's restoring mode, and keeps it: rows that it writes into hypertables would be lost. Close it"
        for row in rows
        if row["is_seen"]
    ]


async def warn_of_stranded_rows(run: Run) -> None:
    """Warn of hypertables that hold rows themselves, beside their chunks: those of a session that was in restoring mode."""
    if not await steps.is_done(run.target, POST_RESTORE):
        return
    with asking("target", "looking at the hypertables"):
        layout = await read_layout(run.target)
        names = [each.name for each in layout.hypertables.values()] if layout else []
        async with run.target.transaction():
            # Else TimescaleDB says of a hypertable itself that it is empty, without a look.
            await run.target.execute("set local timescaledb.restoring = on")
            found = [each for each in names if await run.target.fetchval(_HAS_ROWS.format(each.sql))]
    if found:
        run.reporter.warning(
            f"hypertables of the target hold rows outside of their chunks, which queries do not see: {name_list(found)}. A session wrote them that was in "
            "TimescaleDB's restoring mode. In a session with `set timescaledb.restoring = on`, `select * from only` the table shows them: insert them "
            "anew, in a session begun since"
        )
