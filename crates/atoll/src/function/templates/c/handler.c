/* A function: answers GET with a greeting and POST with what was sent. */
#include "wasi_http.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 4096

/* Where the host puts what it hands over. */
__attribute__((export_name("cabi_realloc"))) void *cabi_realloc(void *old, size_t had, size_t align, size_t wanted) {
    (void)had, (void)align;
    void *at = realloc(old, wanted);
    if (!at) abort();
    return at;
}

static void must(int failed) {
    if (failed) abort();
}

static handle headers(const char *type) {
    field one = {{"content-type", strlen("content-type")}, {type, strlen(type)}};
    handle_result made;
    fields_from_list(&one, 1, &made);
    must(made.is_error);
    return made.value;
}

/* Sends an answer; `content` may be of any length. */
static void answer(handle out, int status, const char *content, uint32_t length) {
    handle response = response_new(headers("text/plain; charset=utf-8"));
    must(response_set_status(response, status));
    handle_result body, stream;
    response_body(response, &body);
    must(body.is_error);
    outgoing_body_write(body.value, &stream);
    must(stream.is_error);
    outparam_set(out, 0, response, 0, 0, 0, 0, 0, 0);
    for (uint32_t at = 0; at < length; at += CHUNK) {
        write_result written;
        stream_write(stream.value, content + at, length - at < CHUNK ? length - at : CHUNK, &written);
        must(written.is_error);
    }
    output_stream_drop(stream.value);
    any_result end;
    outgoing_body_finish(body.value, 0, 0, &end);
}

/* The request's body, at most `limit` bytes of it. */
static text read_body(handle request, uint32_t limit) {
    handle_result body, stream;
    request_consume(request, &body);
    must(body.is_error);
    incoming_body_stream(body.value, &stream);
    must(stream.is_error);
    char *all = malloc(limit);
    must(!all);
    uint32_t length = 0;
    while (length < limit) {
        read_result read;
        stream_read(stream.value, limit - length, &read);
        if (read.is_error) break;
        memcpy(all + length, read.bytes.at, read.bytes.length);
        length += read.bytes.length;
        free((void *)read.bytes.at);
    }
    input_stream_drop(stream.value);
    incoming_body_drop(body.value);
    return (text){all, length};
}

__attribute__((export_name("wasi:http/incoming-handler@0.2.0#handle"))) void handle_request(handle request, handle out) {
    method kind;
    text_option path;
    request_method(request, &kind);
    request_path(request, &path);
    if (!path.is_some) path.value = (text){"/", 1};
    printf("%.*s\n", (int)path.value.length, path.value.at);
    fflush(stdout);
    if (kind.tag == 2) {
        text body = read_body(request, 1 << 20);
        answer(out, 200, body.at, body.length);
    } else {
        char content[1024];
        int shown = path.value.length < 1000 ? (int)path.value.length : 1000;
        int length = snprintf(content, sizeof content, "hello %.*s\n", shown, path.value.at);
        answer(out, 200, content, length);
    }
    request_drop(request);
}
