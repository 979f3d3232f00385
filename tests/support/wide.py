"""Tables that hold every kind of value, and changes that move them through the stream."""

from __future__ import annotations

BUILT_IN = """
create schema wide;
create table wide.numbers (id int primary key, a smallint, b int, c bigint, d real, e double precision, f numeric, g numeric(10, 2), h money, i oid);
create table wide.times (id int primary key, a date, b time, c timetz, d timestamp, e timestamptz, f interval, g timestamptz(2));
create table wide.texts (id int primary key, a text, b varchar(20), c char(5), d bytea, e json, f jsonb, g uuid, h "char", i name);
create table wide.others (id int primary key, a inet, b cidr, c macaddr, d bit(5), e bit varying, f boolean, g point, h polygon, i int[], j text[], k tsvector, l tsquery);
create table wide.ranges (id int primary key, a int4range, b tstzrange, c nummultirange, d int8range[]);
create table wide.big (id int primary key, small text, toasted text, plain int);
alter table wide.big alter toasted set storage external;
create table wide.nothing ();
create table wide.swap (id int primary key, code int unique, note text);
create table wide.by_numeric (k numeric primary key, v text);
create table wide.by_char (k char(6) primary key, v text);
create table wide.by_float (k float8 primary key, v text);
create table wide.equal_rows (a numeric, b json, c text);
alter table wide.equal_rows replica identity full;
create table wide.by_two_toasts (k text, v text, primary key (k));
alter table wide.by_two_toasts alter v set storage external;
create table wide.controls (id int primary key, v text);
create table "wide"."a 'quoted'; ""name"" \\ %s ü 名前" ("select" int primary key, "col 'x'; ""y"" \\ 名" text);
create table wide.{name63} ({column63} int primary key, v text);
create table wide.generated (id int generated always as identity primary key, a int, twice int generated always as (a * 2) stored);
create table wide.xmls (id int primary key, v xml);
"""

CUSTOM = """
create extension hstore schema public;
create extension citext schema public;
create type wide.mood as enum ('sad', 'ok', 'very "happy"');
create type wide.pair as (x int, "y z" text);
create domain wide.positive as int check (value > 0);
create type wide.float_range as range (subtype = float8);
create table wide.custom (id int primary key, a wide.mood, b wide.mood[], c wide.pair, d wide.pair[], e wide.positive, f wide.float_range,
    g public.hstore, h public.citext, i regclass, j wide.positive[]);
create table wide.by_citext (k public.citext primary key, v text);
create table wide.by_enum (k wide.mood primary key, v text);
"""

VALUES = """
insert into wide.numbers values
    ({n} + 1, -32768, -2147483648, -9223372036854775808, '-infinity', 'nan', repeat('9', 100)::numeric, -1.10, '-12.34', 4294967295),
    ({n} + 2, 32767, 2147483647, 9223372036854775807, 'nan', '-infinity', 'nan', 0, '92233720368547758.07', 0),
    ({n} + 3, 0, 0, 0, '-0', '-0', '1.000', 99999999.99, '0', 1), ({n} + 5, 1, 1, 1, 1.1, 1e-300, '-infinity', null, null, null),
    ({n} + 6, 1, 1, 1, 3.4e38, 5e-324, ('0.' || repeat('0', 99) || '1')::numeric, null, null, null);
insert into wide.times values
    ({n} + 1, '-infinity', '00:00', '00:00+15:59', '-infinity', '-infinity', '-1 year 2 mons -3 days 04:05:06.789', 'epoch'),
    ({n} + 2, 'infinity', '24:00', '23:59:59.999999-15:59', 'infinity', 'infinity', '178000000 years', '2026-01-01 12:34:56.789'),
    ({n} + 3, '4713-01-01 BC', '12:00', '12:00+02', '4713-01-01 00:00:00 BC', '0044-03-15 12:00:00+00 BC', '1 day', null),
    ({n} + 4, '5874897-12-31', null, null, '294276-12-31 23:59:59.999999', '294276-12-31 23:59:59.999999+00', '24:00:00', null);
insert into wide.texts values
    ({n} + 1, '', '', '', '', '{{}}', '{{}}', '00000000-0000-0000-0000-000000000000', 'a', 'n'),
    ({n} + 2, E'\\\\N', E'\\\\.', E'\\t', '\\x00ff0a5c09', '{{"a":  1, "a": 2}}', '{{"a": [1.10, null, "\\u00e9"]}}', gen_random_uuid(), '', ''),
    ({n} + 3, 'ü 名前 🐘', E'a\\nb\\rc', '  x', repeat('\\000', 50)::bytea, '"x"', 'null', null, null, null);
insert into wide.controls select {n} + i, 'a' || chr(i) || 'b' from generate_series(1, 160) i;
insert into wide.others values
    ({n} + 1, '::1/128', '10.0.0.0/8', '08:00:2b:01:02:03', '10101', '', true, '(1.5,-2)', '((0,0),(1,1),(1,0))', '{{}}', '{{}}', '', ''),
    ({n} + 2, '192.168.0.1/24', 'fe80::/10', null, null, '1110001', false, null, null, '[2:3]={{1,null}}', '{{"a,b","\\"q\\"",NULL,"null",""}}',
     'a:1A fat:2B,4C ''it''''s'':3', 'fat & (rat | !cat)'),
    ({n} + 3, null, null, null, null, null, null, null, null, '{{{{1,2}},{{3,4}}}}', null, null, null);
insert into wide.ranges values ({n} + 1, 'empty', '[2026-01-01, infinity]', '{{[1.0,2.00), (3,)}}', '{{"[1,5)",empty}}'), ({n} + 2, '(,)', '(,)', '{{}}', '{{}}');
insert into wide.numbers (id) values ({n} + 4); insert into wide.times (id) values ({n} + 5);
insert into wide.texts (id) values ({n} + 4);
insert into wide.big values ({n} + 1, 's', repeat('t' || {n}, 10000), 1), ({n} + 2, 's', repeat('u' || {n}, 10000), 2), ({n} + 3, null, null, null);
insert into wide.nothing default values; insert into wide.nothing default values; insert into wide.nothing default values;
insert into wide.swap values ({n} + 1, {n} + 1, 'one'), ({n} + 2, {n} + 2, 'two');
insert into wide.by_numeric values ({n} + 1.0, 'a'), ({n} + 2, 'b');
insert into wide.by_char values ('k' || {n} / 1000, 'a');
insert into wide.by_float values ({n} + 0.5, 'a'), ({n}, 'zero');
insert into wide.equal_rows values ({n} + 1.0, '{{"a":1}}', 'x'), ({n} + 1.00, '{{"a":1}}', 'x'), ({n} + 1.0, '{{"a": 1}}', 'x'), ({n} + 1.0, '{{"a":1}}', 'x'), (null, null, {n}::text);
insert into wide.by_two_toasts values ('k{n}', repeat('toast', 5000));
insert into "wide"."a 'quoted'; ""name"" \\ %s ü 名前" values ({n}, E'x''"\\\\');
insert into wide.{name63} values ({n}, 'v');
insert into wide.generated (a) values ({n}), ({n} + 1);
"""

XML_VALUES = """insert into wide.xmls values ({n}, '<a b="c">ü &lt; <!-- x --></a>'), ({n} + 1, 'content <b/>'), ({n} + 2, null);"""

CUSTOM_VALUES = """
insert into wide.custom values
    ({n} + 1, 'very "happy"', '{{sad,NULL,"very \\"happy\\""}}', '(1,"a, \"\"b\"\"\")', array[row(1, null)::wide.pair, row(null, '')::wide.pair], 5, '[1.5,2.5]',
     'a=>1, "b c"=>NULL', 'MiXed', 'wide.custom', '{{1,2}}'),
    ({n} + 2, null, '{{}}', '(,)', '{{}}', null, 'empty', '', '', 'pg_class', null);
insert into wide.custom (id) values ({n} + 3);
insert into wide.by_citext values ('Key{n}', 'a'), ('other{n}', 'b');
"""

CHANGES = """
update wide.numbers set c = coalesce(c, 0) / 2, d = '-infinity' where id between {n} and {n} + 9;
delete from wide.numbers where id = {n} + 2;
update wide.times set b = '01:00' where id between {n} and {n} + 9;
update wide.texts set h = 'z', e = e where id between {n} and {n} + 9;
update wide.controls set v = v || v where id between {n} and {n} + 80;
update wide.others set f = not f, j = array_append(j, E'\\t') where id between {n} and {n} + 9;
update wide.ranges set a = '[1,3)' where id between {n} and {n} + 9;
update wide.big set small = 'changed', plain = plain + 1 where id = {n} + 1;
update wide.big set id = id + 100 where id = {n} + 1;
update wide.big set id = id + 200, small = null where id = {n} + 2;
update wide.big set toasted = 'now short' where id = {n} + 200 + 2;
update wide.big set id = id + 300 where id = {n} + 3;
begin; update wide.swap set code = -1 where id = {n} + 1; update wide.swap set code = {n} + 1 where id = {n} + 2;
    update wide.swap set code = {n} + 2 where id = {n} + 1; commit;
update wide.by_numeric set k = k::numeric(20, 5), v = 'more digits' where k = {n} + 1;
update wide.by_numeric set v = 'again' where k = {n} + 1.00;
delete from wide.by_numeric where k = {n} + 2.0;
insert into wide.by_numeric values ({n} + 2.000, 'came back');
update wide.by_char set v = 'b' where k = 'k' || {n} / 1000;
update wide.by_float set v = 'nought' where k = {n};
delete from wide.equal_rows where ctid = (select ctid from wide.equal_rows where a::text = '{n}.0' or a = {n} + 1.0 limit 1);
update wide.equal_rows set c = 'y' where ctid = (select max(ctid) from wide.equal_rows where a = {n} + 1);
update wide.equal_rows set b = '[]' where c = '{n}';
update wide.by_two_toasts set k = k || '-renamed' where k = 'k{n}';
update "wide"."a 'quoted'; ""name"" \\ %s ü 名前" set "select" = "select" + 500000 where "select" = {n};
update wide.{name63} set v = 'w' where {column63} = {n};
update wide.generated set a = a + 1 where a = {n};
"""

XML_CHANGES = """update wide.xmls set v = '<changed/>' where id = {n};"""

CUSTOM_CHANGES = """
update wide.custom set a = 'ok', d = null where id between {n} and {n} + 9;
update wide.by_citext set k = upper(k::text), v = 'upper' where k = 'key{n}';
update wide.by_citext set v = v || '!' where k = 'KEY{n}';
delete from wide.by_citext where k = 'OTHER{n}';
insert into wide.by_citext values ('oTHER{n}', 'back');
"""

_NAMES = {"name63": "t" * 63, "column63": "c" * 63}


def schema(*, custom: bool, xml: bool) -> str:
    """Give the statements that make the tables; without `custom` every type may travel in binary form."""
    built_in = BUILT_IN.format(**_NAMES)
    if not xml:
        built_in = "\n".join(line for line in built_in.splitlines() if "wide.xmls" not in line)
    if not custom:  # these built-in types have no binary form that is safe
        built_in = built_in.replace("h money, i oid", "h bigint, i oid").replace(
            "k tsvector, l tsquery", "k text, l text"
        )
    columns = ", ".join(f"c{i} text" for i in range(199))
    return built_in + f"create table wide.columns_200 (id int primary key, {columns});" + (CUSTOM if custom else "")


def fill(number: int, *, custom: bool, xml: bool) -> str:
    """Give statements that insert the whole set of values with keys from `number` on (steps of 1000 do not collide)."""
    values = VALUES + (XML_VALUES if xml else "") + (CUSTOM_VALUES if custom else "")
    if not custom:
        values = values.replace("'-12.34'", "-12").replace("'92233720368547758.07'", "9").replace("'0', 1)", "0, 1)")
    texts = ", ".join(f"'v{i}'" if i % 3 else "null" for i in range(199))
    return values.format(n=number, **_NAMES) + f"insert into wide.columns_200 values ({number}, {texts});"


def change(number: int, *, custom: bool, xml: bool) -> str:
    """Give statements that change and delete what `fill(number)` inserted."""
    changes = CHANGES + (XML_CHANGES if xml else "") + (CUSTOM_CHANGES if custom else "")
    return (
        changes.format(n=number, **_NAMES)
        + f"update wide.columns_200 set c5 = 'changed', c6 = null where id = {number};"
    )
