/* WASI HTTP by hand: the imports of `wit/` as the component model's canonical ABI lowers them to C. */
#pragma once
#include <stdint.h>

#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))
#define TYPES "wasi:http/types@0.2.0"
#define STREAMS "wasi:io/streams@0.2.0"

typedef int32_t handle;
typedef struct { const char *at; uint32_t length; } text;
typedef struct { text name, value; } field;

/* What functions return through a pointer: which case, and the case's value. */
typedef struct { uint8_t is_error; handle value; } handle_result;
typedef struct { uint8_t is_some; text value; } text_option;
typedef struct { uint8_t tag; text other; } method; /* 0 GET, 1 HEAD, 2 POST, 3 PUT, 4 DELETE, ... */
typedef struct { uint8_t is_error; union { text bytes; struct { uint8_t is_closed; handle error; } failure; }; } read_result;
typedef struct { uint8_t is_error, is_closed; handle error; } write_result;
typedef struct { _Alignas(8) uint8_t space[64]; } any_result;

IMPORT(TYPES, "[method]incoming-request.method") void request_method(handle, method *);
IMPORT(TYPES, "[method]incoming-request.path-with-query") void request_path(handle, text_option *);
IMPORT(TYPES, "[method]incoming-request.consume") void request_consume(handle, handle_result *);
IMPORT(TYPES, "[method]incoming-body.stream") void incoming_body_stream(handle, handle_result *);
IMPORT(STREAMS, "[method]input-stream.blocking-read") void stream_read(handle, uint64_t, read_result *);
IMPORT(TYPES, "[static]fields.from-list") void fields_from_list(const field *, uint32_t, handle_result *);
IMPORT(TYPES, "[constructor]outgoing-response") handle response_new(handle);
IMPORT(TYPES, "[method]outgoing-response.set-status-code") int32_t response_set_status(handle, int32_t);
IMPORT(TYPES, "[method]outgoing-response.body") void response_body(handle, handle_result *);
IMPORT(TYPES, "[method]outgoing-body.write") void outgoing_body_write(handle, handle_result *);
IMPORT(STREAMS, "[method]output-stream.blocking-write-and-flush")
void stream_write(handle, const char *, uint32_t, write_result *);
IMPORT(TYPES, "[static]outgoing-body.finish") void outgoing_body_finish(handle, int32_t, handle, any_result *);
IMPORT(TYPES, "[static]response-outparam.set")
void outparam_set(handle, int32_t, handle, int32_t, int64_t, int32_t, int32_t, int32_t, int32_t);
IMPORT(TYPES, "[resource-drop]incoming-request") void request_drop(handle);
IMPORT(TYPES, "[resource-drop]incoming-body") void incoming_body_drop(handle);
IMPORT(STREAMS, "[resource-drop]input-stream") void input_stream_drop(handle);
IMPORT(STREAMS, "[resource-drop]output-stream") void output_stream_drop(handle);
