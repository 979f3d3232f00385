create extension hstore; create extension citext;
create schema app; create schema "Quo ""ted";
create type app.mood as enum ('sad','ok','happy');
create domain app.positive as integer check (value > 0);
create type app.pair as (a int, b text);
create function app.touch() returns trigger language plpgsql as $$ begin
--
-- Name: fake; Type: TABLE; Schema: public; Owner: -
--
 return new; end $$;
create function app.add(a int, b int) returns int language sql immutable begin atomic; select a + b; end;
create table app.customer (id bigint generated always as identity primary key, name citext not null, attributes hstore, mood app.mood default 'ok', age app.positive, pair app.pair, unique (name) include (age));
create table app.orders (id serial primary key, customer_id bigint not null references app.customer, at timestamptz default now(), total numeric(10,2), doubled numeric generated always as (total*2) stored, constraint positive check (total > 0));
alter table app.orders add constraint late check (total < 1000000) not valid;
create index orders_at on app.orders (at desc) where total > 10; 
create index orders_cl on app.orders(customer_id); alter table app.orders cluster on orders_cl;
create index orders_expr on app.orders ((total + 1)); alter index app.orders_expr alter column 1 set statistics 500;
create statistics app.stat on customer_id, total from app.orders;
create table app.def (a int primary key deferrable initially deferred, b int, constraint u unique (b) deferrable);
create table app.ident (a int not null, b text); create unique index ident_idx on app.ident(a); alter table app.ident replica identity using index ident_idx;
create table app."Weird ""name;" ("select" int primary key, "a'b" text default E'x\\y\n');
comment on table app."Weird ""name;" is 'a comment
-- Name: x; Type: TABLE';
create table app.measure (id int, at date not null, v double precision, primary key (id, at)) partition by range (at);
create table app.measure_1 partition of app.measure for values from ('2020-01-01') to ('2021-01-01');
create table app.measure_2 partition of app.measure for values from ('2021-01-01') to ('2022-01-01') partition by list (id);
create table app.measure_2_a partition of app.measure_2 for values in (1,2);
create index measure_v on app.measure (v);
create table app.excl (r int4range, exclude using gist (r with &&));
create table app.child (id int primary key, measure_id int, measure_at date, foreign key (measure_id, measure_at) references app.measure);
create table app.partfk (id int, c bigint references app.customer) partition by hash (id);
create table app.partfk_0 partition of app.partfk for values with (modulus 1, remainder 0);
create trigger touch before update on app.orders for each row execute function app.touch();
alter table app.orders enable always trigger touch;
create rule no_delete as on delete to app.def do instead nothing;
create view app.by_customer as select c.id, c.name, count(*) n from app.customer c join app.orders o on o.customer_id = c.id group by c.id;
create materialized view app.mat as select customer_id, sum(total) s from app.orders group by 1; create unique index on app.mat(customer_id);
create materialized view app.mat2 as select * from app.mat;
create materialized view app.mat_empty as select 1 a with no data;
alter table app.customer enable row level security; create policy pol on app.customer using (id > 0);
create sequence app.seq start 5 increment 3; select nextval('app.seq');
create unlogged table app.unlog (a int primary key, b text); insert into app.unlog select i, 'x'||i from generate_series(1,1000) i;
create function app.et() returns event_trigger language plpgsql as $$ begin end $$; create event trigger et on ddl_command_end execute function app.et();
comment on constraint orders_customer_id_fkey on app.orders is 'fk comment';
comment on index app.orders_at is 'idx';
comment on column app.orders.total is 'col';
create publication theirs for table app.orders;
create table "Quo ""ted"."tab	le" (x int);
create table app.inh_parent(a int primary key); create table app.inh_child(b int) inherits (app.inh_parent);
create table app.nocol ();
alter table app.orders alter column total set storage external; alter table app.orders alter column customer_id set statistics 777;
alter default privileges in schema app grant select on tables to public;
