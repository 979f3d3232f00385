-- One transaction of the demo's writer, for pgbench. A transaction changes one row of a kind that others may change too,
-- so writers wait for one another but never in a ring.
\set kind random(1, 20)
\set device random(0, 499)
\set customer random(1, :customers)
\set number random(1, 1000000)
begin;
\if :kind <= 8
insert into demo.readings values (clock_timestamp(), :device, 20 + :number / 100000.0, :number % 100)
    on conflict do nothing;
insert into demo.log (line) values ('device ' || :device);
\elif :kind <= 12
with customer as (
    update demo.customers set balance = balance - 1, changed_at = now() where id = :customer returning id
)
insert into demo.orders (customer_id, amount) select id, :number / 100.0 from customer;
\elif :kind <= 15
insert into demo.events (document) values (jsonb_build_object('kind', 'write', 'number', :number));
\elif :kind <= 17
update demo.orders set state = 'sent' where id = (select max(id) from demo.orders where customer_id = :customer);
\elif :kind = 18
delete from demo.orders where id = (select min(id) from demo.orders where customer_id = :customer);
\elif :kind = 19
update demo.readings set temperature = temperature + 1
    where device_id = :device and at = (select max(at) from demo.readings where device_id = :device);
\else
insert into demo.customers (email) values ('late' || :number || '@example.com') on conflict do nothing;
\endif
commit;
