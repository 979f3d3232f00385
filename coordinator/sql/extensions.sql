-- Gives each extension of the database: name, version, whether objects that are no extension's depend on it.
with member as (
    select d.refobjid as extension, d.classid, d.objid
    from pg_depend d where d.refclassid = 'pg_extension'::regclass and d.deptype = 'e'
), uses as (
    select m.extension, u.classid, u.objid,
           case u.classid
               when 'pg_rewrite'::regclass then (select r.ev_class from pg_rewrite r where r.oid = u.objid)
               when 'pg_attrdef'::regclass then (select a.adrelid from pg_attrdef a where a.oid = u.objid)
               when 'pg_constraint'::regclass then (select c.conrelid from pg_constraint c where c.oid = u.objid)
               when 'pg_trigger'::regclass then (select t.tgrelid from pg_trigger t where t.oid = u.objid)
               when 'pg_class'::regclass then coalesce((select i.indrelid from pg_index i where i.indexrelid = u.objid), u.objid)
           end as relation   -- whose part the user is: an extension's own views and indexes use it too
    from member m join pg_depend u on u.refclassid = m.classid and u.refobjid = m.objid and u.deptype in ('n', 'a')
    where u.classid in ('pg_rewrite'::regclass, 'pg_attrdef'::regclass, 'pg_constraint'::regclass, 'pg_trigger'::regclass,
                        'pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_foreign_server'::regclass)
)
select e.extname as name, e.extversion as version,
       exists (select from uses u
               where u.extension = e.oid
                 and not exists (select from member m where m.classid = u.classid and m.objid = u.objid)
                 and not exists (select from member m where m.classid = 'pg_class'::regclass and m.objid = u.relation)) as is_used
from pg_extension e
order by e.extname
