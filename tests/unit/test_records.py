"""Of all records of a class only the fields that are used are kept, as xmlrpc.client would have read them, however the answer
comes."""

import xmlrpc.client

import pytest
from hypothesis import given
from hypothesis import strategies as some

import VmBackup

NAMES = some.one_of(some.sampled_from(VmBackup.RECORD_FIELDS['VDI']), some.sampled_from(
    ['allowed_operations', 'struct', 'member', 'name', 'value', 'x']))
TEXTS = some.text(some.characters(blacklist_categories=['Cs', 'Cc']), max_size=6) | some.sampled_from(['a\nb', '<&>', ' ', '0'])
VALUES = some.recursive(
    TEXTS | some.booleans() | some.integers(-9, 9) | some.floats(allow_nan=False, allow_infinity=False)
    | some.just(xmlrpc.client.DateTime('20170601T05:06:07')) | some.just(xmlrpc.client.Binary(b'x')),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(NAMES | TEXTS, inner, max_size=3), max_leaves=6)
RECORDS = some.dictionaries(NAMES, VALUES, max_size=6)


def parsed(reader, document, cuts=()):
    """The document's value if it comes in these pieces, or the error's class and text."""
    parser, target = reader
    places = sorted({0, len(document), *(cut % (len(document) + 1) for cut in cuts)})
    try:
        for begin, end in zip(places, places[1:]):
            parser.feed(document[begin:end])
        parser.close()
        return target.close()
    except Exception as error:                             # the comparison is of all that can come
        return type(error), str(error)


def plainly(document):
    return parsed(xmlrpc.client.getparser(), document)


def as_records(document, cuts=()):
    target = xmlrpc.client.Unmarshaller()
    return parsed((VmBackup.RecordParser('VDI', target), target), document, cuts)


def kept(record):
    return {field: record[field] for field in VmBackup.RECORD_FIELDS['VDI'] if record.get(field, record) is not record}


def answer(value):
    return xmlrpc.client.dumps(({'Status': 'Success', 'Value': value},), methodresponse=True).encode()


def compact(document):
    """As the server writes it: nothing between the elements, and strings without their own."""
    for tag in (b'value', b'struct', b'data', b'array', b'params', b'param', b'methodResponse', b'member'):
        document = document.replace(b'</' + tag + b'>\n', b'</' + tag + b'>').replace(b'<' + tag + b'>\n', b'<' + tag + b'>')
    return document.replace(b'</name>\n', b'</name>').replace(b'<value><string>', b'<value>').replace(b'</string></value>', b'</value>')


@given(some.dictionaries(TEXTS, RECORDS, max_size=3), some.lists(some.integers(0, 10000), max_size=8), some.booleans())
def test_records_are_what_any_other_answer_would_be_but_for_the_fields(records, cuts, is_compact):
    document = compact(answer(records)) if is_compact else answer(records)
    (full,), (found,) = plainly(document), as_records(document, cuts)
    assert found['Status'] == full['Status'] and list(found['Value']) == list(full['Value'])
    for ref, record in full['Value'].items():
        one = found['Value'][ref]
        assert isinstance(one, VmBackup.Record)
        assert kept(one) == kept(record)
        assert {field: type(value) for field, value in kept(one).items()} == {
            field: type(value) for field, value in kept(record).items()}


SOUND = answer({'ref': {'uuid': 'u', 'x': {'uuid': 'inner', 'y': ['1', {'z': '2'}]}, 'VBDs': ['a', 'b'], 'other_config': {'k': 'v'}}})


def test_a_document_cut_at_any_one_place_is_the_same_and_one_that_ends_there_the_same_error():
    whole = as_records(SOUND)[0]['Value']['ref']
    assert kept(whole) == {'uuid': 'u', 'VBDs': ['a', 'b'], 'other_config': {'k': 'v'}}
    for place in range(len(SOUND)):
        assert kept(as_records(SOUND, [place])[0]['Value']['ref']) == kept(whole)
        document = SOUND[:place]
        assert as_records(document) == plainly(document) or place > SOUND.index(b'</methodResponse>') + 16


@pytest.mark.parametrize('document', [
    answer({}), answer(''), answer(['x']), answer({'ref': 'no record'}),
    xmlrpc.client.dumps(({'Status': 'Failure', 'ErrorDescription': ['SESSION_INVALID', 'x']},), methodresponse=True).encode(),
    xmlrpc.client.dumps(({'Status': 'Failure', 'ErrorDescription': []},), methodresponse=True).encode(),
    xmlrpc.client.dumps(xmlrpc.client.Fault(3, 'no'), methodresponse=True).encode(), b'', b'<html><p>no</html>', b'<html/>',
    b'\xff', SOUND.replace(b'<string>inner', b'<string>\x01'), SOUND.replace(b'<string>u<', b'<string>\x01<'),
    SOUND.replace(b'</methodResponse>', b''), SOUND.replace(b'<string>u</string>', b'<odd>u</odd>'),
    SOUND.replace(b'<string>u</string>', b'<boolean>2</boolean>'), SOUND.replace(b'params>', b'other>'),
    SOUND.replace(b'<string>inner</string>', b'<string>inner</odd>')])
def test_failures_and_answers_that_are_none_are_as_for_any_other_call(document):
    for cuts in ((), range(0, len(document), 7)):
        assert as_records(document, cuts) == plainly(document)


def test_equal_strings_of_different_answers_are_one():
    refs = [''.join(['Opaque', 'Ref:1', str(number)]) for number in (1, 1)]
    first, second = (as_records(answer({ref: {'SR': ref}}))[0]['Value'] for ref in refs)
    assert next(iter(first)) is next(iter(second)) is first[refs[0]]['SR'] is second[refs[1]]['SR']


def test_a_field_that_is_not_kept_is_a_bug_and_one_that_the_server_left_out_is_not():
    record, = as_records(answer({'ref': {'uuid': 'u', 'location': 'x'}}))[0]['Value'].values()
    for ask in (record.get, record.__getitem__, lambda field: VmBackup.Fields('its disk', record, []).text(field)):
        with pytest.raises(KeyError):
            ask('location')
    with pytest.raises(AttributeError):
        record.update({'location': 'x'})
    assert record.get('SR') is None and record.get('SR', '') == ''
    with pytest.raises(KeyError):
        record['SR']
    problems = []
    assert VmBackup.Fields('its disk', record, problems).text('SR') == '' and 'has no usable SR' in problems[0]

