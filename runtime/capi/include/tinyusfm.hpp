// tinyusfm.hpp: C++17 around tinyusfm.h. Handles close themselves, a status becomes a value or an exception of yours.
//
//     tinyusfm::Session session("fetal-head.bundle");             // throws tinyusfm::Error
//     tinyusfm::Reading reading = session.predict(frame);
//
// Nothing here is in the library: it is compiled into your program, with your compiler and its exceptions.
#ifndef TINYUSFM_HPP
#define TINYUSFM_HPP

#include "tinyusfm.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace tinyusfm {

// What went wrong: code() is an enum tusfm_code.
class Error : public std::runtime_error {
public:
    explicit Error(tusfm_status *status) : std::runtime_error(tusfm_status_text(status)), code_(tusfm_status_code(status)) {
        tusfm_status_free(status);
    }
    int32_t code() const noexcept { return code_; }

private:
    int32_t code_;
};

inline void check(tusfm_status *status) {
    if (status) throw Error(status);
}

struct Options : tusfm_options {
    Options() { tusfm_options_init(this, sizeof(tusfm_options)); }
};

// Its address goes to Options::trust; it must live until the session is open.
struct TrustOptions : tusfm_trust_options {
    TrustOptions() { tusfm_trust_options_init(this, sizeof(tusfm_trust_options)); }
};

struct Frame : tusfm_frame {
    Frame() { tusfm_frame_init(this, sizeof(tusfm_frame)); }
    // A grey image, row by row.
    Frame(const uint8_t *grey, int32_t height, int32_t width) : Frame() {
        pixels = grey, rows = height, columns = width, row_stride = width;
    }
};

struct Reading : tusfm_reading {
    Reading() { tusfm_reading_init(this, sizeof(tusfm_reading)); }
};

struct Measurement : tusfm_measurement {
    Measurement() { tusfm_measurement_init(this, sizeof(tusfm_measurement)); }
};

struct Info : tusfm_info {
    Info() { tusfm_info_init(this, sizeof(tusfm_info)); }
};

struct Counters : tusfm_counters {
    Counters() { tusfm_counters_init(this, sizeof(tusfm_counters)); }
};

class Session {
public:
    explicit Session(const std::string &folder, const tusfm_options &options = Options()) {
        tusfm_session *opened = nullptr;
        check(tusfm_open(folder.c_str(), &options, &opened));
        handle_.reset(opened);
    }
    explicit Session(const std::vector<tusfm_file> &files, const tusfm_options &options = Options()) {
        tusfm_session *opened = nullptr;
        check(tusfm_open_memory(files.data(), files.size(), &options, &opened));
        handle_.reset(opened);
    }

    // Pointers in a reading are good until the next call of the same function.
    Reading predict(const tusfm_frame &frame) {
        Reading reading;
        check(tusfm_predict(get(), &frame, &reading));
        return reading;
    }
    uint8_t *room(int64_t bytes) {
        uint8_t *pixels = nullptr;
        check(tusfm_room(get(), bytes, &pixels));
        return pixels;
    }
    void submit(const tusfm_frame &frame) { check(tusfm_submit(get(), &frame)); }
    std::optional<Reading> newest(double wait_ms = 0) {
        Reading reading;
        int32_t there = 0;
        check(tusfm_newest(get(), wait_ms, &reading, &there));
        return there ? std::optional<Reading>(reading) : std::nullopt;
    }
    std::optional<Reading> overlay() {
        Reading reading;
        int32_t there = 0;
        check(tusfm_overlay(get(), &reading, &there));
        return there ? std::optional<Reading>(reading) : std::nullopt;
    }
    Info info() const {
        Info found;
        check(tusfm_get_info(get(), &found));
        return found;
    }
    Counters counters() const {
        Counters found;
        check(tusfm_get_counters(get(), &found));
        return found;
    }
    std::string label(int32_t index) const {
        const char *text = tusfm_label(get(), index);
        return text ? text : "";
    }
    void cancel() noexcept { tusfm_cancel(get()); }
    tusfm_session *get() const noexcept { return handle_.get(); }

private:
    struct Close {
        void operator()(tusfm_session *session) const noexcept { tusfm_close(session); }
    };
    std::unique_ptr<tusfm_session, Close> handle_;
};

// Frames that decide together whether a clip has drifted; see tusfm_drift_observe.
class DriftMonitor {
public:
    explicit DriftMonitor(int32_t window = 0) {
        tusfm_drift_monitor *made = nullptr;
        check(tusfm_drift_monitor_new(window, &made));
        handle_.reset(made);
    }
    void observe(tusfm_reading &reading) { check(tusfm_drift_observe(handle_.get(), &reading)); }

private:
    struct Free {
        void operator()(tusfm_drift_monitor *monitor) const noexcept { tusfm_drift_monitor_free(monitor); }
    };
    std::unique_ptr<tusfm_drift_monitor, Free> handle_;
};

// What was measured of every label, while the reading's pointers are good.
inline std::vector<Measurement> measurements(const tusfm_reading &reading) {
    std::vector<Measurement> found(static_cast<std::size_t>(reading.label_count));
    for (int32_t i = 0; i < reading.label_count; i++) check(tusfm_get_measurement(&reading, i, &found[static_cast<std::size_t>(i)]));
    return found;
}

// The mask of a reading at its frame's own size, row by row.
inline std::vector<uint8_t> mask_on_frame(const tusfm_reading &reading) {
    std::vector<uint8_t> mask(static_cast<std::size_t>(reading.frame_rows) * static_cast<std::size_t>(reading.frame_columns));
    check(tusfm_mask_on_frame(&reading, mask.data(), reading.frame_columns));
    return mask;
}

} // namespace tinyusfm

#endif
