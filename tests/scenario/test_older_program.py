"""What the older program got wrong: one test for each, named after it. Then what it left behind and we have to live with."""

import os
import shutil
import tempfile
from typing import Any, List

import pytest

from support.deeds import backup, beginning, objects, preview
from support.language import MEBIBYTE, at, disk, slowly, uuid_of, vm
from support.process import PROGRAM, ROOT, Pool, Run, run_program
from support.shelf import complete, disk_content, foreign, of_old_program, old, unfinished, write
from support.wire import eventually

SNAPSHOT_FULL = ['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']
RECORDED_UUID = '09383cc3-9408-98b4-bdf4-8a0d84e4be8e'         # of PROD-web in the recorded store
RECORDED_POOL_UUID = b'9164dc8d-1c6b-9bfd-51c8-e4969155c365'


# --- The list --------------------------------------------------------------------------------------------------------

def test_a_failed_export_leaves_no_snapshot_in_the_sr(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=2), vm('db'), faults=[at('http:/export', object='web', breaks_off_after=MEBIBYTE),
                                                       at('http:/export_raw_vdi', breaks_off_after=MEBIBYTE)])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db')
    assert run.exit_status == 1
    assert pool.has_no_snapshots_of_ours()
    assert shelf.names() == [] and shelf.journals() == []


def test_a_users_vm_that_bears_a_snapshots_name_is_never_destroyed(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), vm('RESTORE_web'), vm('web (backup 2016-04-14 00:10:00)'),
                  vm('web (backup 2016-04-14 00:10:00) vmbackup-0123456789abcdef'),
                  vm('db', snapshots=[{'name_label': 'RESTORE_web'}, {'name_label': 'web vmbackup-0123456789abcdef'}]))
    shelf = a_shelf()
    before = objects(pool)
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0
    assert objects(pool) == before


def test_retention_counts_only_finished_copies(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=3), unfinished('web', days_ago=2), old('web', days_ago=1, marker=''),
                    foreign('web/backup-2016-old/', b''), foreign('web/zzz/notes.txt'))
    pool = a_pool(vm('web'))
    run = backup(pool, shelf, 'vm-export=web:2')
    assert run.exit_status == 0
    assert shelf.has('web', complete=2)
    assert shelf.still_holds('web/' + shelf.copies('web')[0], 'web/zzz', 'web/backup-2016-old')


def test_pre_clean_never_deletes_the_last_good_copy_before_the_new_one_exists(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), faults=[at('http:/export', breaks_off_after=MEBIBYTE)])
    shelf = a_shelf(complete('web', days_ago=2))
    run = backup(pool, shelf, 'vm-export=web:1', 'pre_clean=True')
    assert run.exit_status == 1
    assert shelf.still_holds('web') and shelf.has('web', complete=1)


def test_the_exit_status_is_1_when_a_vm_failed(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), vm('db'), faults=[at('api:VM.snapshot', object='web', fails=SNAPSHOT_FULL)])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 1
    assert shelf.has('db', complete=1) and shelf.has('web', complete=0)


def test_the_exit_status_of_a_good_preview_is_0(a_pool: Any, a_shelf: Any) -> None:
    assert preview(a_pool(vm('web')), a_shelf(), 'vm-export=web').exit_status == 0


def test_an_equals_sign_in_a_value_is_part_of_the_value(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('a=b'), vm('a')), a_shelf()
    run = backup(pool, shelf, 'vm-export=a=b')
    assert run.exit_status == 0
    assert [shelf.manifest(folder, shelf.newest(folder))['vm']['name'] for folder in shelf.names()] == ['a=b']


def test_a_vms_name_never_reaches_a_shell(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    bait = os.path.join(shelf.home, 'bait')
    name = 'x"; touch %s; $(touch %s) `touch %s` \'' % (bait, bait, bait)
    pool = a_pool(vm(name))
    run = backup(pool, shelf, 'vm-export=*', 'vdi-export=uuid:' + uuid_of(name), 'compress=gzip')
    assert run.exit_status == 0 and len(shelf.names()) == 1
    assert not os.path.exists(bait)


def test_a_template_or_snapshot_with_a_vms_name_is_not_taken_for_the_vm(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(seed=7)]), vm('db', snapshots=[{'name_label': 'web'}]),
                  vm('web', uuid=uuid_of('template'), is_a_template=True), templates=[{'name_label': 'web'}])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0
    assert shelf.manifest('web', shelf.newest('web'))['vm']['uuid'] == uuid_of('web')
    assert shelf.names() == ['web']


def test_duplicate_names_do_not_stop_the_run(a_pool: Any, a_shelf: Any) -> None:
    one, two = '00000000-0000-4000-8000-000000000001', '00000000-0000-4000-8000-000000000002'
    pool, shelf = a_pool(vm('web', uuid=two), vm('web', uuid=one), vm('db')), a_shelf()
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 3 and 'warning: web' in run.stderr
    assert shelf.names() == ['db', 'web', 'web--00000000']
    assert shelf.manifest('web', shelf.newest('web'))['vm']['uuid'] == one
    assert shelf.manifest('web--00000000', shelf.newest('web--00000000'))['vm']['uuid'] == two


def test_a_truncated_export_is_no_success_although_xe_exits_0(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), vm('db'),
                  faults=[at('http:/export', breaks_off_after=MEBIBYTE + 4096, silent=True),
                          at('http:/export_raw_vdi', breaks_off_after=MEBIBYTE + 4096, silent=True)])
    shelf = a_shelf(complete('web'))
    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db')
    assert run.exit_status == 1
    assert shelf.still_holds('web') and shelf.has('web', complete=1) and shelf.has('db', complete=0)
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours()


def test_a_backup_dir_on_the_root_disk_is_refused_where_a_mount_is_required(a_pool: Any, a_shelf: Any) -> None:
    place = tempfile.mkdtemp(dir='/var/tmp')
    try:
        if os.stat(place).st_dev != os.stat('/').st_dev:
            # On such a machine nothing that a test may write to is known to lie there.
            pytest.skip('/var/tmp is not on the root file system')
        pool, shelf = a_pool(vm('web')), a_shelf(path=place)
        run = backup(pool, shelf, 'vm-export=web', 'require_mount=yes')
        assert run.exit_status == 2
        assert 'root file system' in run.stderr and 'is the share mounted?' in run.stderr
        assert shelf.is_unchanged() and pool.journal() == []
    finally:
        shutil.rmtree(place)


def test_no_directory_or_file_that_we_make_has_a_colon_in_its_name(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('a:b'), vm('db')), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', 'vdi-export=db', 'pool_db_backup=yes')
    assert run.exit_status == 0
    assert [path for path in shelf.tree() if set(path) & set(':<>"|?*\\')] == []


def test_two_runs_at_once_do_not_remove_each_others_work(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]), vm('db'),
                  faults=[slowly(object='web')])
    shelf = a_shelf(complete('web', days_ago=1))
    with beginning(pool, shelf, 'vm-export=web') as first:
        assert eventually(shelf.unfinished)
        second = backup(pool, shelf, 'vm-export=web', words=['lock_wait=0'])
        assert second.exit_status == 5, second
        other = a_config(shelf, 'db.cfg', 'vm-export=*', 'lock_wait=0')
        third = run_other(pool, other)
        assert third.exit_status == 1 and 'in use by another run' in third.stderr, third
        pool.release()
        assert first.ending().exit_status == 0
    assert shelf.has('web', complete=2) and shelf.has('db', complete=1)
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours()


def a_config(shelf: Any, name: str, *lines: str) -> str:
    path = os.path.join(shelf.home, name)
    with open(path, 'w') as file:
        file.write('\n'.join(('backup_dir=' + shelf.path, 'status_log=' + shelf.status_log) + lines) + '\n')
    return path


def run_other(pool: Pool, config: str) -> Run:
    return run_program('-', config, environment=pool.environment())


def test_a_data_disk_that_sorts_first_is_not_taken_for_the_os_disk(a_pool: Any, a_shelf: Any) -> None:
    root = disk(userdevice='0', device='xvda', seed='root', name_label='zzz root')
    data = disk(userdevice='1', device='xvdb', seed='data', name_label='aaa data', uuid='00000000-0000-4000-8000-000000000001')
    pool, shelf = a_pool(vm('web', disks=[data, root])), a_shelf()
    run = backup(pool, shelf, 'vdi-export=web')
    assert run.exit_status == 0
    assert shelf.read('web', shelf.newest('web'), 'web.raw') == disk_content(root)


def test_mail_and_all_other_settings_live_in_the_config_file(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'mail_to=admins@example.org', 'mail_when=problems',
                 'mail_from=xcp1@example.org', 'smtp_server=mail.example.org', 'smtp_port=587', 'smtp_security=starttls')
    assert run.exit_status == 0
    assert shelf.has('web', complete=1)


def test_python_2_is_told_what_is_needed_and_python_3_runs(a_pool: Any, a_shelf: Any) -> None:
    with open(PROGRAM, encoding='utf-8') as file:
        code = [line for line in without_docstring(file.read()).splitlines() if line.strip() and line[0] != '#']
    assert code[0] == 'NEEDS: str = "VmBackup needs Python 3.6 or newer: write /usr/bin/python3 in the crontab"'
    assert backup(a_pool(vm('web')), a_shelf(), 'vm-export=web').exit_status == 0


def without_docstring(source: str) -> str:
    first, docstring, rest = source.split('"""', 2)
    return first + rest


# --- What it left behind ---------------------------------------------------------------------------------------------

SEED_CONFIG = ('max_backups=4', '#', 'vdi-export=PROD-CentOS7-large-user-disks', 'vm-export=PROD*', 'vm-export=DEV-RH*:3',
               'exclude=PROD-ubuntu12-benchmark', 'exclude=PRODtestVM')
SEED_VMS = ('PROD-web', 'PROD-CentOS7-large-user-disks', 'PROD-ubuntu12-benchmark', 'PRODtestVM', 'DEV-RH6', 'DEV-RH7 x',
            'DEV-ubuntu', 'accounting')


def test_the_seed_config_works_as_it_stands(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*[vm(name) for name in SEED_VMS]), a_shelf(*[complete('DEV-RH6', days_ago=day) for day in (1, 2, 3)])
    run = backup(pool, shelf, *SEED_CONFIG)
    assert run.exit_status == 0
    assert shelf.names() == ['DEV-RH6', 'DEV-RH7 x', 'PROD-CentOS7-large-user-disks', 'PROD-web']
    assert shelf.has('PROD-CentOS7-large-user-disks', vdi_exports=1, vm_exports=0)
    assert shelf.has('PROD-web', vm_exports=1) and shelf.has('DEV-RH7 x', vm_exports=1)
    assert shelf.has('DEV-RH6', complete=3), 'the third line keeps three'
    assert shelf.manifest('PROD-web', shelf.newest('PROD-web'))['copies_to_keep'] == 4


OLD_CONFIG = ('exclude=PROD-ubuntu12-benchmark', 'exclude=PRODtest.*', 'max_backups=2', 'pool_db_backup=1',
              'vdi_export_format=vhd', 'vdi-export=PROD-large', 'vm-export=PROD.*', 'vm-export=DEV.*:2', 'wildcards=regex')


def test_a_config_of_version_3_25_with_wildcards_regex_goes_on_in_the_older_programs_store(a_pool: Any,
                                                                                          a_shelf: Any) -> None:
    pool = a_pool(vm('PROD-web', uuid=RECORDED_UUID, disks=2), vm('PROD-large'), vm('PROD-ubuntu12-benchmark'),
                  vm('PRODtestVM'), vm('DEV-1'), vm('accounting'), hosts=[{'name_label': 'vm'}])
    shelf = a_shelf(of_old_program())
    first, second, raw, vhd = shelf.copies('PROD-web')
    (pool_uuid,) = [row['uuid'] for row in pool.dump()['pool'].values()]
    for name in shelf.dumps('vm'):                   # so that they are of this pool
        content = shelf.read('METADATA_vm', name)
        write(shelf.at('METADATA_vm', name), content.replace(RECORDED_POOL_UUID, pool_uuid.encode('ascii')))

    run = backup(pool, shelf, *OLD_CONFIG)

    assert run.exit_status == 0, run
    assert shelf.names() == ['DEV-1', 'METADATA_vm', 'PROD-large', 'PROD-web']
    assert shelf.has('PROD-web', vm_exports=2, vdi_exports=2), 'the older program\'s copies count, each kind for itself'
    assert first not in shelf.names('PROD-web') and run.says('PROD-web/' + first)
    assert shelf.still_holds('PROD-web/' + second, 'PROD-web/' + raw, 'PROD-web/' + vhd)
    assert shelf.image('PROD-large', shelf.newest('PROD-large')) == 'PROD-large.vhd'
    assert len(shelf.dumps('vm')) == 2 and pool.has_no_snapshots_of_ours()


def test_each_older_copy_goes_only_when_enough_newer_ones_of_its_kind_are_there(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('PROD-web', uuid=RECORDED_UUID))
    shelf = a_shelf(of_old_program())
    given = shelf.copies('PROD-web')
    left = []
    for _ in range(3):
        assert backup(pool, shelf, 'vm-export=PROD-web:2').exit_status == 0
        left.append([name for name in given if name in shelf.names('PROD-web')])
    assert left == [given[1:], given[2:], given[2:]], 'vm-exports rotate out, vdi-exports stay'
    assert shelf.has('PROD-web', vm_exports=2, vdi_exports=2)


def test_an_older_copy_of_another_vm_of_the_same_name_is_left(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(of_old_program())
    pool = a_pool(vm('PROD-web'))
    run = backup(pool, shelf, 'vm-export=PROD-web:1')
    assert run.exit_status == 0
    assert shelf.still_holds('PROD-web')
    assert shelf.has('PROD-web--' + uuid_of('PROD-web')[:8], complete=1)


def test_an_older_copy_without_a_uuid_belongs_to_the_only_vm_of_that_name(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=2, uuid='-'), old('web', days_ago=1, uuid='-', kind='vdi-export'))
    pool = a_pool(vm('web'))
    run = backup(pool, shelf, 'vm-export=web:1')
    assert run.exit_status == 0
    assert shelf.names() == ['web'] and shelf.has('web', vm_exports=1, vdi_exports=1)


def test_each_marker_of_the_older_program_counts_and_a_copy_without_one_does_not(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=5, marker='success_compress', suffix='.gz'), old('web', days_ago=4, marker=''),
                    old('web', days_ago=3, marker='success_restore'), old('web', days_ago=2, marker='success_compressing'),
                    old('web', days_ago=1, image=b''))
    oldest, failed, middle, newest, empty = [name for name in shelf.names('web')]
    pool = a_pool(vm('web'))
    run = backup(pool, shelf, 'vm-export=web:3')
    assert run.exit_status == 0
    assert oldest not in shelf.names('web')
    assert shelf.still_holds('web/' + failed, 'web/' + middle, 'web/' + newest, 'web/' + empty)


def test_the_older_command_line_words_still_work(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', words=['compress=True', 'ignore_extra_keys=True', 'pre_clean=True'],
                 password='password')
    assert run.exit_status == 0
    assert shelf.image('web', shelf.newest('web')) == 'web.xva.gz'


# --- Coming from it --------------------------------------------------------------------------------------------------

OLD_VMS = ('PROD-web', 'PROD-large', 'PROD-ubuntu12-benchmark', 'PRODtestVM', 'DEV-1', 'accounting')
CRON_WORDS = ['pre_clean=True', 'ignore_extra_keys=True', 'preview']


def to_back_up(run: Run) -> List[str]:
    body = run.stdout.split(' to back up:', 1)[1].split('  In all:', 1)[0]
    return [name for name in OLD_VMS if '  %s (' % name in body]


def test_preview_of_a_config_of_version_3_25_says_what_would_be_otherwise_and_how_it_stays_as_it_was(a_pool: Any,
                                                                                                     a_shelf: Any) -> None:
    pool = a_pool(*[vm(name, uuid=RECORDED_UUID if name == 'PROD-web' else uuid_of(name)) for name in OLD_VMS])
    shelf = a_shelf(of_old_program())
    lines = OLD_CONFIG[:-1]

    run = backup(pool, shelf, *lines, words=CRON_WORDS, password='password')
    assert run.exit_status == 3 and to_back_up(run) == ['PROD-large']
    (prod,) = [line for line in run.stdout.splitlines() if line.startswith('Warning: vm-export=PROD.* (')]
    assert '1 VM (then vm-export with 2 copies, now not backed up): PROD-web' in prod and 'write PROD* in this line' in prod
    (dev,) = [line for line in run.stdout.splitlines() if line.startswith('Warning: vm-export=DEV.*:2 (')]
    assert 'DEV-1' in dev and 'add wildcards=regex to the config' in dev and 'write DEV*:2' in dev

    kept = backup(pool, shelf, *lines, 'wildcards=regex', words=CRON_WORDS, password='password')
    assert kept.exit_status == 0 and to_back_up(kept) == ['PROD-web', 'PROD-large', 'DEV-1']
    assert 'NAUbackup 3' not in kept.stdout
    assert 'PROD-web/, which holds 4 good copies of it (4 made by the older program: they count as any other)' in kept.stdout

    by_wildcards = [line.replace('.*', '*') for line in lines]
    again = backup(pool, shelf, *by_wildcards, words=CRON_WORDS, password='password')
    assert again.exit_status == 0 and to_back_up(again) == to_back_up(kept) and 'NAUbackup 3' not in again.stdout

    meant = backup(pool, shelf, *lines, 'wildcards=shell', words=CRON_WORDS, password='password')
    assert to_back_up(meant) == to_back_up(run) and 'NAUbackup 3' not in meant.stdout
    assert shelf.is_unchanged()


def test_a_line_that_matches_nothing_as_it_is_read_now_is_told_once(a_pool: Any, a_shelf: Any) -> None:
    told = preview(a_pool(vm('PROD-1'), vm('db')), a_shelf(), 'vm-export=P.+:3', 'exclude=d.*')
    assert told.exit_status == 1
    (error, exclude) = [line for line in told.stdout.splitlines() if 'vm-export=P.+:3 (' in line or 'exclude=d.* (' in line]
    assert error.startswith('Error: ') and 'write /P.+.*/:3 in this line' in error
    assert exclude.startswith('Warning: ') and 'write d* in this line' in exclude and 'did you mean' not in told.stdout


def test_a_backup_says_nothing_of_what_only_preview_tells(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('PRO', disks=0), vm('PROD-1')), a_shelf()
    told = preview(pool, shelf, 'vm-export=PROD*')
    assert told.exit_status == 0 and 'PRO (' in told.stdout.split('Note: vm-export=PROD*', 1)[1]
    run = backup(pool, shelf, 'vm-export=PROD*')
    assert run.exit_status == 0 and not run.says('NAUbackup 3') and shelf.names() == ['PROD-1']


def test_an_exclude_that_was_a_regex_says_so_where_it_excludes_nothing_now(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('test-1')), a_shelf()
    told = preview(pool, shelf, 'vm-export=web', 'vm-export=test-1', 'exclude=test.+')
    assert told.exit_status == 3
    (line,) = [line for line in told.stdout.splitlines() if 'exclude=test.+ (' in line]
    assert '1 VM (then not backed up, now vm-export with 4 copies): test-1' in line and 'write /test.+.*/' in line
    run = backup(pool, shelf, 'vm-export=web', 'exclude=test.+')
    assert run.exit_status == 3 and run.says('excludes no VM of the pool. As a regex it would match 1 VM')


def test_readmes_way_to_switch_makes_one_new_copy_and_removes_no_old_one(a_pool: Any, a_shelf: Any) -> None:
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
        page = file.read().split('\n## Coming from NAUbackup\n')[1].split('\n## ')[0]
    commands = [line.partition(' # ')[0].split()[2:] for line in page.splitlines() if line.startswith('    python3 VmBackup.py ')]
    assert len(commands) == 3
    pool = a_pool(vm('web'), vm('db'))
    shelf = a_shelf(old('web', days_ago=2), old('web', days_ago=1), old('db', days_ago=1))
    given, config = shelf.copies('web'), shelf.config('max_backups=3', 'vm-export=[wd]*b*', 'wildcards=regex')
    for password, target, *words in commands:
        assert target == 'weekend.cfg'
        run = run_program(password, config, *words, environment=pool.environment())
        assert run.exit_status == 0, run
    assert [name in shelf.copies('web') for name in given] == [True, True] and shelf.has('web', complete=3)
    assert shelf.has('db', complete=1)
    assert all(name in run.stdout for name in shelf.copies('web'))
