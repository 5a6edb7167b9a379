// What the emulator tells the checker (checker.cpp). Without TRACMOD_CHECK nothing is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace check {

enum class Access { read, write, atomic, copy };  // copy: the start of an asynchronous copy

#ifdef TRACMOD_CHECK

// Ranges of memory that exist before any launch.
void add_shared(const char* name, const void* begin, size_t bytes);
void add_stacks(const void* begin, size_t bytes);
void begin_launch(const char* kernel, const void* closure, size_t closure_bytes);
void end_launch();
void begin_block();
// Switches the recording of accesses on or off: it is on while device code runs.
void record(bool on);
void access(const void* at, size_t bytes, Access access, const void* code);
void next_round();
void join_lanes(int first, uint32_t mask);
// Adds a report. `kind` is one word, `text` a sentence.
void report(const char* kind, const std::string& text);
// Device memory set by the host.
void host_write(const void* at, size_t bytes);

#else

inline void add_shared(const char*, const void*, size_t) {}
inline void add_stacks(const void*, size_t) {}
inline void begin_launch(const char*, const void*, size_t) {}
inline void end_launch() {}
inline void begin_block() {}
inline void record(bool) {}
inline void access(const void*, size_t, Access, const void*) {}
inline void next_round() {}
inline void join_lanes(int, uint32_t) {}
inline void report(const char*, const std::string&) {}
inline void host_write(const void*, size_t) {}

#endif

}  // namespace check
