/*
 * Text traces: lines of fields to requests.
 *
 * A layout says which field of a line holds what and in which unit; what an operation is called comes from a
 * list of words. One pass splits a line up to the last field that matters, the numbers are read from there.
 *
 * Invariants
 * 1. Only whole lines are read; what follows the last newline is the caller's to bring again.
 * 2. After a bad line the parser stands behind it: calling again goes on with the next one.
 * 3. Nothing of a line reaches the output before all of it was accepted. Ends of requests stay below 2^63,
 *    reads and writes below 4 GiB, as the block layer's own do.
 * 4. Devices that have numbers keep them, others are numbered by trace_names.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blocksnap.h"
#include "error.h"
#include "trace_names.h"

#define FIELDS_MAX 32
#define SHOWN 40 /* characters of a bad field in a message */
#define LENGTH_MAX UINT32_MAX
#define END_MAX INT64_MAX

struct span {
	const char *begin;
	const char *end;
};

struct word {
	uint64_t key;
	uint32_t kind;
};

struct bs_trace_parser {
	struct bs_trace_layout layout;
	struct word *words;
	int nr_words;
	int fields; /* to split: the last one that matters, and one */
	uint64_t clock;
	uint64_t line;
	uint64_t record;
	struct bs_trace_names *names;
};

/* At most the first eight characters of a word in lower case: enough to tell operations apart. */
static uint64_t word_key(struct span s)
{
	uint64_t key = 0;
	int shift = 0;

	for (const char *p = s.begin; p < s.end && shift < 64; p++, shift += 8) {
		unsigned char c = (unsigned char)*p;
		key |= (uint64_t)(c >= 'A' && c <= 'Z' ? c | 0x20 : c) << shift;
	}
	return key;
}

static int last_field(const struct bs_trace_layout *l)
{
	const int32_t used[] = {l->time, l->offset, l->length, l->kind, l->device, l->host, l->filter};
	int last = -1;

	for (size_t i = 0; i < sizeof(used) / sizeof(used[0]); i++)
		last = used[i] > last ? used[i] : last;
	return last;
}

int bs_trace_parser_create(const struct bs_trace_layout *layout, const struct bs_trace_word *words,
	int nr_words, struct bs_trace_names *names, struct bs_trace_parser **ret)
{
	int fields = last_field(layout) + 1;

	if (fields > FIELDS_MAX || layout->offset < 0 || layout->length < 0 || layout->kind < 0)
		return bs_fail(
			-EINVAL, "a trace needs offset, length and operation within %d fields", FIELDS_MAX);
	struct bs_trace_parser *p = calloc(1, sizeof(*p));
	struct word *copy = calloc((size_t)nr_words + 1, sizeof(*copy));
	if (!p || !copy) {
		free(p);
		free(copy);
		return bs_fail(-ENOMEM, "out of memory");
	}
	for (int i = 0; i < nr_words; i++) {
		size_t length = strnlen(words[i].text, sizeof(words[i].text));
		copy[i].key = word_key((struct span){words[i].text, words[i].text + length});
		copy[i].kind = words[i].kind;
	}
	p->layout = *layout;
	p->words = copy;
	p->nr_words = nr_words;
	p->fields = fields;
	p->names = names;
	*ret = p;
	return 0;
}

void bs_trace_parser_destroy(struct bs_trace_parser *parser)
{
	if (!parser)
		return;
	free(parser->words);
	free(parser);
}

static bool is_blank(char c)
{
	return c == ' ' || c == '\t' || c == '\r';
}

static struct span trim(struct span s)
{
	while (s.begin < s.end && is_blank(*s.begin))
		s.begin++;
	while (s.end > s.begin && is_blank(s.end[-1]))
		s.end--;
	return s;
}

static struct span unquote(struct span s)
{
	if (s.end - s.begin >= 2 && *s.begin == '"' && s.end[-1] == '"')
		return trim((struct span){s.begin + 1, s.end - 1});
	return s;
}

/* Fields between runs of blanks. */
static int split_blanks(struct span line, struct span *out, int capacity)
{
	int count = 0;
	const char *p = line.begin;

	while (count < capacity) {
		while (p < line.end && is_blank(*p))
			p++;
		if (p == line.end)
			break;
		out[count].begin = p;
		while (p < line.end && !is_blank(*p))
			p++;
		out[count++].end = p;
	}
	return count;
}

static int split_at(struct span line, char separator, struct span *out, int capacity)
{
	int count = 0;
	const char *p = line.begin;

	while (count < capacity) {
		const char *begin = p;
		bool quoted = false;
		while (p < line.end && (*p != separator || quoted))
			quoted ^= *p++ == '"';
		out[count++] = unquote(trim((struct span){begin, p}));
		if (p == line.end)
			break;
		p++;
	}
	return count;
}

/* Write "what "field" why" with the field cut to what a line of a message can hold. */
static int refuse(const char *what, struct span s, const char *why)
{
	char shown[SHOWN + 1];
	size_t length = (size_t)(s.end - s.begin);
	size_t kept = length < SHOWN ? length : SHOWN;

	for (size_t i = 0; i < kept; i++) {
		unsigned char c = (unsigned char)s.begin[i];
		shown[i] = c < 0x20 || c > 0x7e ? '?' : (char)c;
	}
	shown[kept] = 0;
	return bs_fail(-EBADMSG, "%s \"%s%s\" %s", what, shown, length > SHOWN ? "..." : "", why);
}

/* Digits from *at on; stops at the first other character. False if they exceed 64 bits. */
static bool read_digits(const char **at, const char *end, uint64_t *ret)
{
	const char *p = *at;
	const char *safe = end - p > 19 ? p + 19 : end; /* 19 digits always fit */
	uint64_t value = 0;

	for (; p < safe && (unsigned char)(*p - '0') < 10; p++)
		value = value * 10 + (unsigned char)(*p - '0');
	for (; p < end && (unsigned char)(*p - '0') < 10; p++)
		if (__builtin_mul_overflow(value, 10, &value) ||
			__builtin_add_overflow(value, (unsigned char)(*p - '0'), &value))
			return false;
	*at = p;
	*ret = value;
	return true;
}

static int read_count(const char *what, struct span s, uint64_t unit, uint64_t *ret)
{
	const char *p = s.begin;
	uint64_t value;

	if (s.begin < s.end && *s.begin == '-')
		return refuse(what, s, "is negative");
	if (!read_digits(&p, s.end, &value) || __builtin_mul_overflow(value, unit, &value))
		return refuse(what, s, "is absurd: beyond 64 bits of bytes");
	if (p == s.begin || p != s.end)
		return refuse(what, s, "is not a whole number");
	*ret = value;
	return 0;
}

/* A decimal number of units to nanoseconds, rounded down. */
static int read_time(struct span s, uint64_t unit, uint64_t *ret)
{
	const char *p = s.begin;
	uint64_t whole, part = 0;

	if (s.begin < s.end && *s.begin == '-')
		return refuse("time", s, "is negative");
	if (!read_digits(&p, s.end, &whole) || __builtin_mul_overflow(whole, unit, &whole))
		return refuse("time", s, "is absurd: beyond 64 bits of nanoseconds");
	if (p == s.begin)
		return refuse("time", s, "is not a number");
	if (p < s.end && *p == '.') {
		uint64_t scale = 1;
		for (p++; p < s.end && (unsigned char)(*p - '0') < 10; p++) {
			if (scale >= 1000000000)
				continue;
			part = part * 10 + (unsigned char)(*p - '0');
			scale *= 10;
		}
		part = unit >= 1000000000 ? unit / scale * part : unit * part / scale;
	}
	if (p != s.end)
		return refuse("time", s, "is not a number");
	if (__builtin_add_overflow(whole, part, ret))
		return refuse("time", s, "is absurd: beyond 64 bits of nanoseconds");
	return 0;
}

static int number_of_name(struct bs_trace_parser *parser, struct span s, uint32_t *ret)
{
	switch (trace_names_number(parser->names, s.begin, (size_t)(s.end - s.begin), ret)) {
	case 0:
		return 0;
	case -ENOSPC:
		return refuse("device", s, "is one name too many: 4096 can be told apart");
	default:
		return refuse("device", s, "is not a name of 1 to 254 bytes");
	}
}

/* A number, "MAJOR,MINOR", or a name. */
static int read_device(struct bs_trace_parser *parser, struct span s, uint32_t *ret)
{
	const char *p = s.begin;
	uint64_t value, minor;

	if (p < s.end && (unsigned char)(*p - '0') < 10 && read_digits(&p, s.end, &value) &&
		value <= UINT32_MAX) {
		if (p == s.end) {
			*ret = (uint32_t)value;
			return 0;
		}
		const char *q = p + 1;
		if (*p == ',' && q < s.end && read_digits(&q, s.end, &minor) && q == s.end && value < 4096 &&
			minor < 1 << 20) {
			*ret = (uint32_t)(value << 20 | minor);
			return 0;
		}
	}
	return number_of_name(parser, s, ret);
}

/* blkparse's letters: a flush may stand before the operation, FUA and others behind it. A flush alone has no
 * sector: the process in brackets follows at once. */
static uint32_t kind_of_letters(struct span s, bool has_place, bool *preflush)
{
	const char *p = s.begin;

	*preflush = p < s.end && *p == 'F';
	p += *preflush;
	if (*preflush && !has_place)
		return BS_REQUEST_FLUSH;
	switch (p < s.end ? *p : 0) {
	case 'R':
		return BS_REQUEST_READ;
	case 'W':
		return BS_REQUEST_WRITE;
	case 'D':
		return BS_REQUEST_DISCARD;
	default:
		return BS_TRACE_NOTHING;
	}
}

static int kind_of_word(const struct bs_trace_parser *parser, struct span s, uint32_t *ret)
{
	uint64_t key = word_key(s);

	for (int i = 0; i < parser->nr_words; i++)
		if (parser->words[i].key == key) {
			*ret = parser->words[i].kind;
			return 0;
		}
	return refuse("operation", s, "is unknown");
}

static int check_place(uint32_t kind, struct span offset, struct span length, const struct bs_request *r)
{
	uint64_t end;

	if (__builtin_add_overflow(r->offset, r->length, &end) || end > END_MAX)
		return refuse("offset", offset, "is absurd: no device has 2^63 bytes");
	if (kind != BS_REQUEST_DISCARD && r->length > LENGTH_MAX)
		return refuse("length", length, "is absurd: no request has 4 GiB");
	return 0;
}

static int read_place(
	const struct bs_trace_layout *l, const struct span *fields, int count, struct bs_request *r)
{
	if (l->offset >= count || l->length >= count)
		return bs_fail(-EBADMSG, "has %d fields, needs %d: cut, or of another format", count,
			(l->offset > l->length ? l->offset : l->length) + 1);
	int err = read_count("offset", fields[l->offset], l->offset_unit, &r->offset);
	if (!err)
		err = read_count("length", fields[l->length], l->length_unit, &r->length);
	return err ? err : check_place(r->kind, fields[l->offset], fields[l->length], r);
}

/* Time and address space of a line. */
static int read_origin(struct bs_trace_parser *parser, const struct span *fields, struct bs_request *r)
{
	const struct bs_trace_layout *l = &parser->layout;
	uint32_t host = 0;
	int err = 0;

	r->time = parser->clock;
	if (l->time >= 0)
		err = read_time(fields[l->time], l->time_unit, &r->time);
	if (!err && l->device >= 0)
		err = read_device(parser, fields[l->device], &r->device);
	if (!err && l->host >= 0)
		err = number_of_name(parser, fields[l->host], &host);
	if (!err && host)
		r->device |= host << 16;
	if (!err && l->ordered && r->time < parser->clock)
		return refuse("time", fields[l->time],
			"is before that of the record before: sort the trace (--sort)");
	return err;
}

static bool passes_filter(const struct bs_trace_layout *l, const struct span *fields, int count)
{
	if (l->filter < 0)
		return true;
	return l->filter < count &&
	       word_key(fields[l->filter]) ==
		       word_key((struct span){l->filter_word,
			       l->filter_word + strnlen(l->filter_word, sizeof(l->filter_word))});
}

static int needed_fields(const struct bs_trace_layout *l)
{
	int needed = l->kind;

	needed = l->time > needed ? l->time : needed;
	needed = l->device > needed ? l->device : needed;
	return (l->host > needed ? l->host : needed) + 1;
}

static int kind_of_line(const struct bs_trace_parser *parser, const struct span *fields, int count,
	uint32_t *ret, bool *preflush)
{
	const struct bs_trace_layout *l = &parser->layout;

	if (!l->letters)
		return kind_of_word(parser, fields[l->kind], ret);
	bool has_place = l->offset < count && *fields[l->offset].begin != '[';
	*ret = kind_of_letters(fields[l->kind], has_place, preflush);
	return 0;
}

/* What fio calls a wait: microseconds since the request before. */
static int advance_clock(struct bs_trace_parser *parser, const struct span *fields, int count)
{
	int field = parser->layout.offset;
	uint64_t wait;

	if (field >= count)
		return bs_fail(
			-EBADMSG, "has %d fields, needs %d: cut, or of another format", count, field + 1);
	int err = read_count("wait", fields[field], 1000, &wait);
	if (!err && __builtin_add_overflow(parser->clock, wait, &parser->clock))
		err = refuse("wait", fields[field], "is absurd: beyond 64 bits of nanoseconds");
	return err;
}

/* One line to at most two requests (a preflush comes before its write); returns how many. */
static int parse_line(struct bs_trace_parser *parser, struct span line, struct bs_request *out)
{
	const struct bs_trace_layout *l = &parser->layout;
	struct span fields[FIELDS_MAX];
	struct bs_request r = {0};
	bool preflush = false;
	int count = l->separator == ' ' ? split_blanks(line, fields, parser->fields)
					: split_at(line, l->separator, fields, parser->fields);

	if (!passes_filter(l, fields, count))
		return 0;
	parser->record++;
	if (count < needed_fields(l))
		return bs_fail(-EBADMSG, "has %d fields, needs %d: cut, or of another format", count,
			needed_fields(l));
	int err = kind_of_line(parser, fields, count, &r.kind, &preflush);
	if (err || r.kind == BS_TRACE_NOTHING)
		return err;
	if (r.kind == BS_TRACE_WAIT)
		return advance_clock(parser, fields, count);
	err = read_origin(parser, fields, &r);
	if (!err && r.kind != BS_REQUEST_FLUSH)
		err = read_place(l, fields, count, &r);
	if (err)
		return err;
	parser->clock = r.time;
	preflush &= r.kind != BS_REQUEST_FLUSH;
	if (preflush)
		*out++ = (struct bs_request){.time = r.time, .kind = BS_REQUEST_FLUSH, .device = r.device};
	*out = r;
	return 1 + preflush;
}

static bool is_comment(const char *p, const char *end)
{
	while (p < end && is_blank(*p))
		p++;
	return p == end || *p == '#';
}

int bs_trace_parser_parse(struct bs_trace_parser *parser, const char *text, size_t length,
	struct bs_request *out, size_t capacity, struct bs_trace_progress *ret)
{
	const char *p = text, *end = text + length;
	int count = 0;

	ret->count = 0;
	while (count >= 0 && ret->count + 2 <= capacity && p < end) {
		const char *newline = memchr(p, '\n', (size_t)(end - p));
		if (!newline)
			break;
		struct span line = {p, newline};
		p = newline + 1;
		parser->line++;
		if (is_comment(line.begin, line.end))
			continue;
		count = parse_line(parser, line, out + ret->count);
		ret->count += count > 0 ? (size_t)count : 0;
	}
	ret->consumed = (size_t)(p - text);
	ret->record = parser->record;
	ret->line = parser->line;
	return count < 0 ? count : 0;
}
