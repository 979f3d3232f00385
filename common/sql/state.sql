-- The migration's state, on the target. Dropped by `clean`.
create schema _live_migration;

create table _live_migration.migration (
    singleton boolean primary key default true check (singleton),
    id uuid not null,
    name text not null,
    phase text not null check (phase in ('prepare', 'schema', 'copy', 'replay', 'cutover', 'done')),
    settings jsonb not null,                -- without secrets
    kafka text not null,
    source_address text not null,           -- host:port/database, for people
    source_system text not null,
    source_timeline integer not null,
    source_database text not null,
    source_version integer not null,
    topic_id uuid not null,
    lane_count integer not null,
    binary_stream boolean,                  -- decided in prepare
    start_lsn pg_lsn,                       -- the slot's consistent point
    publication_change integer not null default 0,
    cutover_lsn pg_lsn,
    created_at timestamptz not null default clock_timestamp(),
    phase_at timestamptz not null default clock_timestamp(),
    -- the coordinator's lease
    owner text,
    epoch bigint not null default 0,
    backend_pid integer,
    backend_start timestamptz,
    lease_until timestamptz
);

create table _live_migration.tables (
    oid oid primary key,                    -- on the source: a relation is its oid, never its name
    schema_name text not null,
    table_name text not null,
    lane integer not null,                  -- the first one
    lanes integer not null default 1,       -- how many that follow one another: several for a table that is split by key
    publication text not null check (publication in ('all', 'insert')),
    persistence "char" not null default 'p',
    kind text not null default 'table' check (kind in ('table', 'hypertable', 'chunk')),
    hypertable_oid oid,                     -- of a chunk, on the source
    compressed_oid oid,                     -- table of the chunk's compressed rows, copied together with it
    compressed_name text,                   -- its quoted, qualified name
    range text,                             -- condition that holds for the rows of a chunk alone; of one that came after the plan: from when
                                            -- it is marked on, or copied
    seen_range text,                        -- of one that came after the plan: what the coordinator saw last; 'false' where all of it is passed over
    root_schema text,                       -- hypertable on the target that changes of the chunk (or hypertable) go to
    root_name text,
    is_left_out boolean not null default false,     -- holds a continuous aggregate's rows, which a target of plain tables does not get
    copies_to_root boolean not null default false,  -- rows of the chunk, or of a table that becomes one, are copied through the hypertable, too
    rebuild text,                           -- why its lane must copy the chunk (or newcomer) anew, null: it need not
    rebuild_lsn pg_lsn,                     -- which it does once it has applied all before this
    unseen_lsn pg_lsn,                      -- what may have been missed was before this: a copy from after it is whole
    -- of a table that came after the plan: made on the target; in the stream, all of it, from its snapshot on; gone again from the source.
    -- Of a chunk that came after it: a lane has met it.
    newcomer text check (newcomer in ('made', 'followed', 'gone', 'met')),
    made_oid oid,                           -- of the table that was made for it on the target, which none but that one is dropped for
    columns jsonb not null,                 -- [{"name", "type", "generated"}] as planned, in attnum order
    binary_copy boolean not null,
    row_estimate bigint not null default 0,
    size_bytes bigint not null default 0,
    changed_row_count bigint not null default 0,    -- rows that the source had ever updated or deleted, when planned
    statistics text,                        -- which statistics that was counted in: of other ones it tells nothing
    state text not null default 'planned' check (state in ('planned', 'copying', 'copied', 'ready', 'stopped')),
    attempt integer not null default 0,
    snapshot_id text,                       -- exported by the holder, while state = 'copying'
    snapshot text,                          -- pg_current_snapshot() of the copy
    horizon pg_lsn,                         -- insert position right after the snapshot
    timeline integer,                       -- on which both were taken
    file_mark text,                         -- which file and columns the copy saw: of others, its rows may have got new values
    row_count bigint not null default 0,    -- copied
    byte_count bigint not null default 0,
    started_at timestamptz,
    copied_at timestamptz,
    error text,
    hint text,
    retry_at timestamptz,
    is_unpublished boolean not null default false,  -- somebody took it out of our publications: to be published and copied again
    copy_again boolean not null default false,  -- has changes that the stream does not carry: copied once more at the cutover
    is_passed_over boolean not null default false,      -- while copy_again: a row stands in the way of a newer one, and lanes pass its changes over
    -- the lease of the snapshot's holder
    owner text,
    backend_pid integer,                    -- the holder's target backend
    backend_start timestamptz,
    source_pid integer,                     -- its backend on the source, which holds lock and snapshot there
    source_start timestamptz,
    lease_until timestamptz,
    unique (schema_name, table_name)
);
create index on _live_migration.tables (hypertable_oid) where hypertable_oid is not null;
-- What claims ask for, by the thousand where there are thousands of tables.
create index on _live_migration.tables (size_bytes desc, oid) where state = 'planned';
create index on _live_migration.tables (size_bytes desc, oid) where state = 'stopped';
create index on _live_migration.tables (oid) where state = 'copied';

create table _live_migration.parts (
    oid oid not null references _live_migration.tables on delete cascade,
    part integer not null,
    attempt integer not null,
    first_block bigint not null,
    end_block bigint,                       -- exclusive; null: open end
    size_bytes bigint not null,
    state text not null default 'pending' check (state in ('pending', 'copying', 'done')),
    row_count bigint not null default 0,
    byte_count bigint not null default 0,
    owner text,
    backend_pid integer,
    backend_start timestamptz,
    source_pid integer,
    source_start timestamptz,
    lease_until timestamptz,
    primary key (oid, part)
);

create table _live_migration.indexes (
    oid oid primary key,                    -- on the source
    table_oid oid not null,
    name text not null,
    statements text[] not null,             -- run in one transaction
    is_primary boolean not null,
    is_unique boolean not null,
    size_bytes bigint not null default 0,
    state text not null default 'pending' check (state in ('pending', 'building', 'done')),
    error text,
    retry_at timestamptz,
    owner text,
    backend_pid integer,
    backend_start timestamptz,
    lease_until timestamptz
);
create index on _live_migration.indexes (table_oid);

create table _live_migration.checkpoints (
    lane integer primary key,
    next_offset bigint not null default 0,  -- of the topic's partition with the lane's number
    commit_lsn pg_lsn not null default '0/0',
    ordinal bigint not null default 0,
    barrier text,                           -- id of the last barrier passed
    arrived_lsn pg_lsn,                     -- transaction where the lane waits, or waited last, for others of its table: all it has before is applied
    epoch bigint not null default 0,        -- raised by each new owner
    owner text,
    backend_pid integer,
    backend_start timestamptz,
    change_count bigint not null default 0,
    byte_count bigint not null default 0,
    commit_time timestamptz,                -- of the last source transaction applied
    updated_at timestamptz,
    error text,
    hint text,
    refused jsonb                           -- the one change that the target refuses, where known: {"position", "relation", "kind", "reason"}
) with (fillfactor = 50);

create table _live_migration.skips (            -- changes that the user gave up, each by its position
    lane integer not null references _live_migration.checkpoints,
    commit_lsn pg_lsn not null,
    ordinal bigint not null,
    relation text not null,
    kind text not null,
    reason text not null,                   -- what the target said
    requested_at timestamptz not null default clock_timestamp(),
    skipped_at timestamptz,                 -- set together with the checkpoint that passes it
    primary key (lane, commit_lsn, ordinal)
);

create table _live_migration.suspects (         -- chunks compressed into tables that do not tell their changes yet, or decompressed from such
    compressed_oid oid primary key,             -- on the source, as all of these; the chunk's own where it was decompressed
    chunk_schema text not null,
    chunk_name text not null,
    hypertable_schema text not null,
    hypertable_name text not null
);

create table _live_migration.workers (
    id text primary key,
    kind text not null check (kind in ('producer', 'consumer', 'coordinator')),
    host text not null,
    pid integer not null,
    started_at timestamptz not null default clock_timestamp(),
    seen_at timestamptz not null default clock_timestamp(),
    rss_bytes bigint not null default 0,
    error text
);

create table _live_migration.source_changes (   -- what `clean` gives back
    id bigint generated always as identity primary key,
    kind text not null,                     -- replica_identity, job, database_setting; publication: not given back, but known for ours
    oid oid,                                -- of the table or publication; a job's id
    object text not null,
    before text not null,
    after text not null,
    restored boolean not null default false
);

create table _live_migration.target_jobs (      -- TimescaleDB's jobs of the target, held until the hand-over
    id integer primary key,                     -- on the target
    name text not null,
    is_scheduled boolean not null,              -- on the source, before we paused any: what it gets at the end
    is_released boolean not null default false,
    source_id integer                           -- of one that we made; null: the source's id is the same
);

create table _live_migration.requests (
    id bigint generated always as identity primary key,
    kind text not null check (kind in ('cutover')),
    requested_at timestamptz not null default clock_timestamp(),
    handled_at timestamptz,
    result text
);

create table _live_migration.events (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    level text not null,
    message text not null
);

create table _live_migration.steps (            -- what a phase has done already, for when it is entered again
    name text primary key,
    progress bigint not null default 0,         -- how many of the step's entries are done
    is_done boolean not null default false,
    at timestamptz not null default clock_timestamp()
);

create table _live_migration.archives (         -- the source's schema as pg_dump gave it, so that any host can go on
    name text primary key,
    content bytea not null
);

create table _live_migration.foreign_keys (
    oid oid primary key,                        -- of the constraint on the source
    schema_name text not null,
    table_name text not null,
    name text not null,
    statement text not null,                    -- as pg_dump gave it
    is_partitioned boolean not null,            -- its table
    is_valid boolean not null,                  -- on the source
    state text not null default 'pending' check (state in ('pending', 'added', 'valid', 'failed'))
);

create table _live_migration.late_statements (   -- triggers, rules and policies of newcomers, made at the hand-over
    id bigint generated always as identity primary key,
    table_oid oid not null,                     -- on the source
    label text not null,
    statement text not null,                    -- as pg_dump gave it
    is_done boolean not null default false
);

-- Whether an index's statements lock its table against other builds (ALTER TABLE), as CREATE INDEX does not.
create function _live_migration.is_exclusive(statements text[]) returns boolean language sql immutable as $function$
    select exists (select from unnest(statements) s where s !~* '^\s*create\s+(unique\s+)?index\s')
$function$;

-- Claims one after the other; the lock is taken and let go within one statement, whatever becomes of who claims.
create function _live_migration.claim_index(text, integer, timestamptz, double precision)
returns table (oid oid, table_oid oid, schema_name text, table_name text, name text, statements text[])
language plpgsql set lock_timeout = '2s' as $function$
#variable_conflict use_column
begin
    perform pg_advisory_xact_lock(5069837231101002);
    return query
        with candidate as (
            select i.oid from _live_migration.indexes i join _live_migration.tables t on t.oid = i.table_oid
            where t.state = 'copied' and i.state = 'pending' and coalesce(i.retry_at <= clock_timestamp(), true)
              -- a hypertable's, once all rows that are copied through it are there
              and not exists (select from _live_migration.tables c
                              where c.hypertable_oid = t.oid and c.copies_to_root and c.state not in ('copied', 'ready'))
              and not exists (select from _live_migration.indexes o
                              where o.table_oid = i.table_oid and o.state = 'building'
                                and (_live_migration.is_exclusive(o.statements) or _live_migration.is_exclusive(i.statements)))
            order by i.is_primary desc, i.is_unique desc, i.size_bytes desc, i.oid
            limit 1 for update of i skip locked
        )
        update _live_migration.indexes i
        set state = 'building', retry_at = null, owner = $1, backend_pid = $2, backend_start = $3,
            lease_until = clock_timestamp() + make_interval(secs => $4)
        from candidate c, _live_migration.tables t where i.oid = c.oid and t.oid = i.table_oid
        returning i.oid, i.table_oid, t.schema_name, t.table_name, i.name, i.statements;
end
$function$;
